"""One calibration, many sizes: nested models from one look at the dense one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedModel

from .allocation import Outlook, allocated, look_at
from .criteria import CRITERIA
from .data import Batches
from .derivatives import Derivatives, derivatives_of
from .errors import BudgetError
from .fusion import with_fusion
from .job import Job, plan_counts, prepare_
from .journal import Journal
from .natural_gradient import Aim, aim_of
from .plan import Nested
from .progress import Progress, named, silent
from .pruning import Report, prune_
from .reading import reading
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .stream import BlockStream
from .workbench import Workbench


def prune_family(
    load: Callable[[], PreTrainedModel],
    calibration: Batches,
    recipe: Recipe,
    sparsities: Sequence[float],
    *,
    refit: Batches | None = None,
    outlook: Outlook | None = None,
    journal: Journal | None = None,
    bench: Workbench | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[PreTrainedModel, Report]]:
    """(model, report) of every size, the largest model first; the units of each are a subset of those before it.

    The dense model is looked at once, or not at all where numbers of units are known and each size scores anew; its
    answers are what steps of natural gradient aim at in every size. A search for budgets, where the recipe has one, is
    made at the middle size. That size takes the plan found; smaller budgets take no more from any site than it does,
    larger ones no less, by the prices that the search found or by the damage expected. Where consumers are repaired or
    refitted, each size scores and solves on the inputs behind its own pruned prefix, and chooses among the units that
    the size before kept. Where they are not, and with an `outlook` from before, the scores of the dense model rank the
    units of all sizes.

    Args:
        load: gives the dense model, a new one each time.
        calibration: see `prune_`.
        recipe: for all sizes; its own sparsity does not matter.
        sparsities: shares to remove.
        refit: see `prune_`.
        outlook: what was seen of the dense model before, in place of looking; the search was made at its own size.
        journal: see `prune_`.
        bench: see `prune_`.
        progress: told about every block of every size.

    Raises:
        BudgetError: one of the sizes cannot be met by whole units; said before anything is pruned.
        CalibrationError: statistics are not finite; names the block.
    """
    sizes = [replace(recipe, sparsity=sparsity) for sparsity in sorted(set(sparsities))]
    model = load()
    jobs = [plan_counts(model, size) for size in sizes]
    middle, bench = sizes[len(sizes) // 2], bench or Workbench()
    common = _common(model, calibration, middle, jobs, outlook, refit, journal, bench, progress)
    sizes = [replace(common.recipe, sparsity=size.sparsity) for size in sizes]
    within = _within_plan(sizes, jobs, common.outlook)
    ceiling = _ceiling(model, within, jobs[0], common.outlook)
    del model, jobs
    floor: dict[str, int] = {}
    among: dict[str, Tensor] | None = {} if common.anew else None
    for size in sizes:
        pruned = load()
        report = prune_(
            pruned,
            calibration,
            size,
            refit=refit,
            outlook=common.outlook,
            nested=Nested(floor=floor, ceiling=ceiling if size in within else {}, among=among),
            derivatives=common.derivatives,
            aim=common.aim,
            bench=bench.part(f"{size.sparsity:g}"),
            progress=named(progress, f"{size.sparsity:g}"),
        )
        report.notes.extend(common.notes)
        floor = {key: site["units"] - site["kept"] for key, site in report.sites.items()}
        among = None if among is None else dict(report.plan.kept)
        yield pruned, report


@dataclass(frozen=True, kw_only=True)
class _Common:
    """What all sizes share: the recipe, completed, and what the dense model gave, each only where one reads it.

    `anew`: each size scores units on its own inputs. `notes`: for every report.
    """

    recipe: Recipe
    anew: bool
    outlook: Outlook | None
    derivatives: Derivatives | None = None
    aim: Aim | None = None
    notes: list[str] = field(default_factory=list)


def _common(
    model: PreTrainedModel,
    calibration: Batches,
    recipe: Recipe,
    jobs: Sequence[Job],
    outlook: Outlook | None,
    refit: Batches | None,
    journal: Journal | None,
    bench: Workbench,
    progress: Progress,
) -> _Common:
    """By one look at the dense model, unless there was one before or no size reads more of it than its derivatives."""
    anew, derivatives, notes = outlook is None and _scores_anew(recipe), Derivatives(), list[str]()
    read = reading(calibration, refit, recipe, jobs[0].sites)
    if outlook is None:
        job = prepare_(model, recipe)
        if anew and all(job.counts is not None for job in jobs):
            derivatives = derivatives_of(model, read, job.sites, recipe)
            recipe, notes = with_fusion(model, read, recipe, job, derivatives, bench, progress)
        else:
            outlook, recipe, derivatives = look_at(model, calibration, recipe, job, progress, journal, bench, refit)
    aim = None
    if recipe.natural_steps:
        leaving = outlook.leaving if outlook is not None else None
        aim = aim_of(BlockStream(model, read.batches), read, recipe.natural_steps, leaving, progress).off()
    return _Common(
        recipe=recipe,
        anew=anew,
        outlook=outlook and replace(outlook, leaving=None),
        derivatives=derivatives if anew else None,
        aim=aim,
        notes=notes,
    )


def _scores_anew(recipe: Recipe) -> bool:
    """Whether each size scores units on its own inputs: it sees these anyway, and its plan alone says how many go."""
    counts = not recipe.per_block or all(CRITERIA[part.criterion].curve for part in (recipe.attention, recipe.ffn))
    return counts and recipe.policy is None and RECONSTRUCTIONS[recipe.reconstruction].stage != "none"


def _within_plan(sizes: Sequence[Recipe], jobs: Sequence[Job], outlook: Outlook | None) -> list[Recipe]:
    """The sizes up to that of the plan which a search found over the same sites."""
    found = outlook.chosen if outlook is not None else None
    if found is None or set(found.counts) != {site.key for site in jobs[0].sites}:
        return []
    return [size for size, job in zip(sizes, jobs, strict=True) if job.budget.target <= found.target]


def _ceiling(model: PreTrainedModel, sizes: Sequence[Recipe], job: Job, outlook: Outlook | None) -> dict[str, int]:
    """Units that some sizes may lose at most: those of the plan that a search found, so that it can follow them.

    Empty where there are no such sizes, or one of them cannot be met within that plan.
    """
    if outlook is None or outlook.chosen is None or not sizes:
        return {}
    nested = Nested(ceiling={site.key: site.n_units - outlook.chosen.counts[site.key] for site in job.sites})
    try:
        for size in sizes:
            planned = allocated(plan_counts(model, size, nested), size, outlook)
            nested = replace(nested, floor={site.key: site.n_units - planned.keeps(site) for site in planned.sites})
    except BudgetError:
        return {}
    return dict(nested.ceiling)
