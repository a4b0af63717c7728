"""One calibration, many sizes: nested models from one look at the dense one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from .allocation import Outlook, allocated, look_at
from .data import Batches
from .errors import BudgetError
from .job import Job, plan_counts, prepare_
from .journal import Journal
from .plan import Nested
from .progress import Progress, named, silent
from .pruning import Report, prune_
from .recipe import Recipe
from .workbench import Workbench


def prune_family(
    load: Callable[[], PreTrainedModel],
    calibration: Batches,
    recipe: Recipe,
    sparsities: Sequence[float],
    *,
    refit: Batches | None = None,
    journal: Journal | None = None,
    bench: Workbench | None = None,
    progress: Progress = silent,
) -> Iterator[tuple[PreTrainedModel, Report]]:
    """(model, report) of every size, the largest model first; the units of each are a subset of those before it.

    The dense model is looked at once: its scores rank the units of all sizes, and a search for budgets, where the
    recipe has one, is made at the middle size. That size takes the plan found; smaller budgets take no more from any
    site than it does, larger ones no less, by the prices that the search found or by the damage expected. Only the
    repairs are made anew, each size on the inputs behind its own pruned prefix.

    Args:
        load: gives the dense model, a new one each time.
        calibration: see `prune_`.
        recipe: for all sizes; its own sparsity does not matter.
        sparsities: shares to remove.
        refit: see `prune_`.
        journal: see `prune_`.
        bench: see `prune_`.
        progress: told about every block of every size.

    Raises:
        BudgetError: one of the sizes cannot be met by whole units; said before anything is pruned.
        CalibrationError: statistics are not finite; names the block.
    """
    sizes = [replace(recipe, sparsity=sparsity) for sparsity in sorted(set(sparsities))]
    model = load()
    for size in sizes:
        plan_counts(model, size)
    n = len(sizes) // 2
    bench = bench or Workbench()
    job = prepare_(model, sizes[n])
    outlook = look_at(model, calibration, sizes[n], job, progress, journal, bench, refit)
    ceiling = _ceiling(model, sizes[: n + 1], job, outlook)
    del model
    floor: dict[str, int] = {}
    for place, size in enumerate(sizes):
        pruned = load()
        report = prune_(
            pruned,
            calibration,
            size,
            refit=refit,
            outlook=outlook,
            nested=Nested(floor=floor, ceiling=ceiling if place <= n else {}),
            bench=bench.part(f"{size.sparsity:g}"),
            progress=named(progress, f"{size.sparsity:g}"),
        )
        floor = {key: site["units"] - site["kept"] for key, site in report.sites.items()}
        yield pruned, report


def _ceiling(model: PreTrainedModel, sizes: Sequence[Recipe], job: Job, outlook: Outlook) -> dict[str, int]:
    """Units that sizes up to the searched one may lose at most: those of the plan found, so that it can follow them.

    Empty where no plan was searched, or one of the sizes cannot be met within it.
    """
    if outlook.chosen is None:
        return {}
    nested = Nested(ceiling={site.key: site.n_units - outlook.chosen.counts[site.key] for site in job.sites})
    try:
        for size in sizes:
            planned = allocated(plan_counts(model, size, nested), size, outlook)
            nested = replace(nested, floor={site.key: site.n_units - planned.keeps(site) for site in planned.sites})
    except BudgetError:
        return {}
    return dict(nested.ceiling)
