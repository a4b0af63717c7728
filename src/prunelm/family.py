"""One calibration, many sizes: nested models from one look at the dense one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from transformers import PreTrainedModel

from .allocation import look_at
from .data import Batches
from .job import plan_counts, prepare_
from .journal import Journal
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
    recipe has one, is made at the middle size and the prices that it implies used for all. Only the repairs are made
    anew, each size on the inputs behind its own pruned prefix.

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
    middle = sizes[len(sizes) // 2]
    bench = bench or Workbench()
    outlook = look_at(model, calibration, middle, prepare_(model, middle), progress, journal, bench, refit)
    del model
    floor: dict[str, int] = {}
    for size in sizes:
        pruned = load()
        report = prune_(
            pruned,
            calibration,
            size,
            refit=refit,
            outlook=outlook,
            floor=floor,
            bench=bench.part(f"{size.sparsity:g}"),
            progress=named(progress, f"{size.sparsity:g}"),
        )
        floor = {key: site["units"] - site["kept"] for key, site in report.sites.items()}
        yield pruned, report
