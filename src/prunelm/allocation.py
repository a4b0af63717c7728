"""How many units stay, decided by looking at the dense model; what was seen serves every size of a family."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .allocators import ALLOCATORS
from .allocators.uniform import summed, uniform_plans
from .data import Batches
from .depth import block_influence
from .derivatives import Derivatives, derivatives_of
from .descent import descend
from .errors import CalibrationError
from .fusion import with_fusion
from .job import Job, decide
from .journal import Journal
from .knapsack import knapsack
from .losses import objective, without_labels
from .policy import Policy
from .policy_search import search
from .probable import most_probable
from .progress import Progress
from .reading import Reading, reading
from .recipe import Recipe
from .rehearsal import Rehearsal
from .search import Found, pick
from .sensitivity import Divergence, rehearsed
from .stream import BlockStream, States
from .survey import Survey, repair_of, survey
from .workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the dense model showed, and what a search made of it.

    `chosen` is the search's plan at one size; `prices` what a unit of relative error costs in each site there, which
    plans the other sizes; `notes` say so. `leaving`: the hidden states behind the last block, where the recipe takes
    steps of natural gradient, which aim at what the dense model makes of them.
    """

    survey: Survey
    prices: dict[str, float] = field(default_factory=dict)
    chosen: Found | None = None
    notes: list[str] = field(default_factory=list)
    leaving: States | None = None

    def report(self) -> dict[str, dict[str, Any]]:
        """What to say per site: the prices measured."""
        found: dict[str, dict[str, Any]] = {key: {"prices": points} for key, points in self.survey.prices.items()}
        for key, price in self.prices.items():
            found.setdefault(key, {})["price"] = price
        return found

    def measured(self, needs: str, job: Job, recipe: Recipe) -> dict[str, Float[Tensor, " number"]]:
        """What an allocator reads: by the prices of the search where there was one, else what the survey measured."""
        if not self.prices:
            return self.survey.measured(needs, job.sites, job.budget, recipe)
        curves = self.survey.measured("curves", job.sites, job.budget, recipe)
        return {key: self.prices[key] * curve for key, curve in curves.items()}


def look(
    stream: BlockStream,
    read: Reading,
    recipe: Recipe,
    job: Job,
    *,
    derivatives: Derivatives,
    journal: Journal | None = None,
    bench: Workbench,
    progress: Progress,
) -> Outlook:
    """Scores, curves and prices of the dense model, and a search at the job's budget where the recipe asks for one.

    Args:
        stream: at the first block of the dense model; it is used up.
        read: which batches are for what.
        recipe: the whole of it.
        job: sites and budget.
        derivatives: of the dense model, where criteria or the allocator read them.
        journal: of the search; on the bench by default.
        bench: where blocks and rounds are kept, and read from when they were seen before.
        progress: told about blocks and rounds.

    Raises:
        BudgetError: the sites cannot lose that much.
        CalibrationError: statistics are not finite; names the block.
        DataError: the output is judged, and no sequence is held out.
    """
    needs, journal = ALLOCATORS[recipe.allocator].needs, journal or bench.journal("search")
    if recipe.policy is not None:
        return _by_policy(stream, read, recipe, job, recipe.policy, derivatives, journal, bench, progress)
    divergence = Divergence(stream, read.priced(recipe), read.judged_batches) if recipe.judges_plans else None
    found = survey(
        stream,
        read,
        recipe,
        job,
        divergence=divergence if needs == "damage" else None,
        keep=recipe.searches,
        derivatives=derivatives,
        through=recipe.natural_steps > 0,
        bench=bench,
        progress=progress,
    )
    leaving = stream.hidden if recipe.natural_steps else None
    if divergence is None or not recipe.searches:
        return Outlook(survey=found, leaving=leaving)
    best = _searched(found, divergence, recipe, job, journal, progress)
    found.moments.clear()
    note = _search_note(best, divergence.rows, read.repeated_tokens)
    return Outlook(survey=found, prices=best.prices, chosen=best, notes=[note], leaving=leaving)


def _search_note(best: Found, tokens: int, repeated: int) -> str:
    """What a search measured, and whether it was any use."""
    on = f"{tokens:,} held-out tokens"
    on += f" ({repeated:,} in sequences that say their first half twice)" if repeated else ""
    if best.tried == 1:
        return f"the search had no other plan to try than the first: divergence {best.start:.4f} on {on}"
    note = f"{best.tried} plans tried on {on}: divergence {best.start:.4f}"
    return note + (f" -> {best.divergence:.4f}" if best.divergence < best.start else "; none was better than the first")


def _by_policy(
    stream: BlockStream,
    read: Reading,
    recipe: Recipe,
    job: Job,
    policy: Policy,
    derivatives: Derivatives,
    journal: Journal,
    bench: Workbench,
    progress: Progress,
) -> Outlook:
    """Scores of units whose order a policy search found, from a start by the recipe's criteria."""
    model = stream.model
    read.check_held("a policy is judged on")
    loss, held = (
        objective(recipe.loss, model, batches, unlabeled="kl", seed=recipe.seed)
        for batches in (read.fitted, read.judging)
    )
    if policy.layers == "block":
        influence = block_influence(model, [without_labels(batch) for batch in read.fitted.batches])
        metric = {site.key: influence[site.block].expand(site.n_units) for site in job.sites}
    else:
        metric = survey(
            stream,
            read,
            recipe,
            job,
            divergence=None,
            keep=False,
            derivatives=derivatives,
            bench=bench,
            progress=progress,
        ).scores
    found = search(model, job, metric, policy, loss, held, seed=recipe.seed, journal=journal, progress=progress)
    return Outlook(survey=Survey(scores=found.scores), notes=found.notes)


def _searched(
    found: Survey,
    divergence: Divergence,
    recipe: Recipe,
    job: Job,
    journal: Journal,
    progress: Progress,
) -> Found:
    """The best plan that a search finds: of those with equal widths, or by descent from the allocator's own."""
    needs = ALLOCATORS[recipe.allocator].needs
    assert needs is not None
    measured = found.measured(needs, job.sites, job.budget, recipe)
    with Rehearsal(job.sites, found.scores, found.moments, repair_of(recipe), recipe.ridge) as rehearsal:

        def judge(counts: Mapping[str, int]) -> float:
            rehearsal.forget()
            return rehearsed({s.key: s.n_units - counts[s.key] for s in job.sites}, rehearsal, divergence)

        if ALLOCATORS[recipe.allocator].even:
            plans = list(uniform_plans(job.sites, job.budget))
            plans.sort(key=lambda plan: summed(job.sites, job.budget, measured, plan[0]))
            return pick(
                plans,
                judge,
                target=job.budget.target,
                candidates=recipe.candidates,
                journal=journal,
                progress=progress,
            )
        return descend(
            job.sites,
            job.budget,
            knapsack(job.sites, job.budget, measured),
            rehearsal,
            divergence,
            found.curves,
            rounds=recipe.rounds,
            seed=recipe.seed,
            journal=journal,
            progress=progress,
        )


def allocated(job: Job, recipe: Recipe, outlook: Outlook) -> Job:
    """The job with its counts: those of the outlook's search where that was for this very budget, else by its prices.

    Raises:
        BudgetError: the sites cannot lose that much, or blocks would differ where a stock config says one number.
        CalibrationError: the outlook has not seen all the sites; names those.
    """
    unseen = [site.key for site in job.sites if site.key not in outlook.survey.scores]
    if unseen:
        raise CalibrationError(
            f"the saved calibration has not seen {', '.join(unseen[:3])}{' and others' * (len(unseen) > 3)}, which may "
            "lose units here: calibrate again with the same --for and --sites"
        )
    notes = [*job.notes, *(note for note in outlook.notes if note not in job.notes)]
    if job.counts is not None:
        return replace(job, notes=notes)
    if recipe.policy is not None:
        counts, step = most_probable(job.sites, job.budget, outlook.survey.scores, recipe.policy)
        return replace(job, counts=counts, step=step, notes=notes)
    chosen = outlook.chosen
    if chosen is not None and _serves(chosen, job):
        return replace(job, counts=chosen.counts, step=chosen.step, notes=notes)
    if chosen is not None:
        how = "the prices it found" if outlook.prices else "the damage expected of them, which was not measured"
        notes.append(f"that search was for another size: widths here are by {how}")
    wanted = ALLOCATORS[recipe.allocator].needs
    assert wanted is not None
    return decide(replace(job, notes=notes), recipe, outlook.measured(wanted, job, recipe))


def _serves(found: Found, job: Job) -> bool:
    """Whether a plan was made for this very budget, and keeps what the job's sites may keep."""
    same = found.target == job.budget.target and set(found.counts) == {site.key for site in job.sites}
    return same and all(site.n_units - found.counts[site.key] in job.budget.options(site) for site in job.sites)


def look_at(
    model: PreTrainedModel,
    calibration: Batches,
    recipe: Recipe,
    job: Job,
    progress: Progress,
    journal: Journal | None = None,
    bench: Workbench | None = None,
    refit: Batches | None = None,
) -> tuple[Outlook, Recipe, Derivatives]:
    """The outlook of a model that is dense and stays so, and what it was made by; `refit` as for `prune_`.

    That is the recipe, with the fusion weights that were found, and the derivatives.
    """
    bench = bench or Workbench()
    read = reading(calibration, refit, recipe, job.sites)
    derivatives = derivatives_of(model, read, job.sites, recipe)
    recipe, notes = with_fusion(model, read, recipe, job, derivatives, bench, progress)
    stream = BlockStream(model, read.batches)
    found = look(stream, read, recipe, job, derivatives=derivatives, journal=journal, bench=bench, progress=progress)
    return replace(found, notes=[*notes, *found.notes]), recipe, derivatives
