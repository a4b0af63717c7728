"""How many units stay, decided by looking at the dense model; what was seen serves every size of a family."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from .allocators import ALLOCATORS
from .allocators.uniform import summed, uniform_plans
from .data import Batches
from .gradients import Gradient
from .job import Job, decide
from .progress import Progress
from .reading import Reading, reading
from .recipe import Recipe
from .search import Found, bent, judge_of, pick, refine
from .sensitivity import Divergence
from .stream import BlockStream
from .survey import Survey, repair_of, survey


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the dense model showed, and what a search made of it.

    `bends` change the prices as the search at one size found best; `chosen` is its plan there; `notes` say so.
    """

    survey: Survey
    bends: dict[str, float] | None = None
    chosen: Found | None = None
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, dict[str, Any]]:
        """What to say per site: the prices measured."""
        return {key: {"prices": points} for key, points in self.survey.prices.items()}


def look(
    stream: BlockStream,
    read: Reading,
    recipe: Recipe,
    job: Job,
    *,
    gradients: Mapping[str, Gradient] | None,
    progress: Progress,
) -> Outlook:
    """Scores, curves and prices of the dense model, and a search at the job's budget where the recipe has candidates.

    Args:
        stream: at the first block of the dense model; it is used up.
        read: which batches are for what.
        recipe: the whole of it.
        job: sites and budget.
        gradients: of the dense model, where a criterion reads them.
        progress: told about blocks and candidates.

    Raises:
        BudgetError: the sites cannot lose that much.
        CalibrationError: statistics are not finite; names the block.
        DataError: prices are wanted, and no sequence is held out.
    """
    priced = ALLOCATORS[recipe.allocator].needs == "damage"
    divergence = Divergence(stream, read.priced(recipe)) if priced else None
    found = survey(
        stream, read.fit, recipe, job, read.needs, divergence=divergence, gradients=gradients, progress=progress
    )
    if divergence is None or recipe.candidates == 1:
        return Outlook(survey=found)
    prices = found.measured("damage", job.sites, job.budget)
    judge = judge_of(divergence, job.sites, found, repair_of(recipe), recipe.ridge)
    options: dict[str, Any] = {"candidates": recipe.candidates, "progress": progress}
    if ALLOCATORS[recipe.allocator].even:
        plans = list(uniform_plans(job.sites, job.budget))
        plans.sort(key=lambda plan: summed(job.sites, job.budget, prices, plan[0]))
        best = pick(job.sites, plans, judge, target=job.budget.target, **options)
    else:
        best = refine(job.sites, job.budget, prices, judge, **options)
    note = f"{best.tried} plans tried on {divergence.rows:,} held-out tokens: divergence {best.start:.4f}"
    note += f" -> {best.divergence:.4f}" if best.divergence < best.start else "; none was better than the first"
    return Outlook(survey=found, bends=best.bends or None, chosen=best, notes=[note])


def allocated(job: Job, recipe: Recipe, outlook: Outlook) -> Job:
    """The job with its counts: those of the outlook's search where that was for this very budget, else by its prices.

    Raises:
        BudgetError: the sites cannot lose that much, or blocks would differ where a stock config says one number.
    """
    if job.counts is not None:
        return job
    notes = [*job.notes, *outlook.notes]
    chosen = outlook.chosen
    if chosen is not None and chosen.target == job.budget.target and not job.budget.floor:
        return replace(job, counts=chosen.counts, step=chosen.step, notes=notes)
    wanted = ALLOCATORS[recipe.allocator].needs
    assert wanted is not None
    measured = outlook.survey.measured(wanted, job.sites, job.budget)
    if outlook.bends is not None:
        measured = bent(job.sites, measured, outlook.bends)
    return replace(decide(job, recipe, measured), notes=notes)


def look_at(model: PreTrainedModel, calibration: Batches, recipe: Recipe, job: Job, progress: Progress) -> Outlook:
    """The outlook of a model that is dense and stays so."""
    read = reading(calibration, None, recipe, job.sites)
    gradients = read.gradients(model, job.sites)
    return look(BlockStream(model, read.batches), read, recipe, job, gradients=gradients, progress=progress)
