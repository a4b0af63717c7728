"""The widths that make a model faster by a factor: predicted from times of layers, measured in turns, mended."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .allocation import Outlook
from .allocators import ALLOCATORS, PER_UNIT
from .errors import BudgetError
from .job import with_counts
from .knapsack import knapsack
from .layer_times import Times, layer_times, ratio_in_turns, run_seconds, saved_seconds, stand_in
from .limits import Speedup
from .loading import Source
from .plan import Counts, Decided
from .progress import Progress
from .recipe import Recipe
from .sites import Site
from .sizing import Sized, Sizer, Trial, least_trial

CLOSE, TRIES = 0.02, 3
"""How near a measured factor must be to the asked one, and how many plans are measured for that."""
ROUNDS = 7
MICRO = 1_000_000


def sped(limit: Speedup, source: Source, recipe: Recipe, outlook: Outlook | None, progress: Progress) -> Sized:
    """The recipe at the least that must go for a model to be so much faster than the dense one.

    What is timed are models of the same shapes with arbitrary weights. A plan is made by what layers took at several
    widths; it is then measured in turns with the dense shapes, and made again with what was off taken into account.

    Raises:
        BudgetError: not even the narrowest sites make it so fast.
    """
    sizer = Sizer(source, recipe, outlook)
    if sizer.looks:
        return Sized(recipe=replace(recipe, sparsity=min(recipe.sparsity, sizer.recipe_at(sizer.top).sparsity)))
    job = sizer.whole.job
    times, path = layer_times(source, limit, job.sites, job.budget, recipe.unit, progress)
    dense = stand_in(source, {}, recipe.unit)
    whole = _typical(dense, limit)
    aimed, best, tried = limit.factor, None, []
    for attempt in range(TRIES):
        progress("measuring speed", attempt, TRIES)
        trial = _planned(sizer, times, whole * (1 - 1 / aimed), limit)
        ratio = ratio_in_turns([dense, stand_in(source, trial.counts, recipe.unit)], limit, ROUNDS)
        tried.append(round(ratio, 4))
        if best is None or abs(ratio / limit.factor - 1) < abs(best[1] / limit.factor - 1):
            best = (trial, ratio)
        if abs(ratio / limit.factor - 1) <= CLOSE:
            break
        aimed = max(1.001, aimed * limit.factor / ratio)
    progress("measuring speed", TRIES, TRIES)
    assert best is not None
    return _sized(limit, *best, whole, tried, path.name)


def _sized(limit: Speedup, trial: Trial, ratio: float, whole: float, tried: list[float], file: str) -> Sized:
    what = "tokens one by one" if limit.decode else f"{limit.batch} x {limit.length} tokens"
    asked: dict[str, Any] = {
        "speedup": limit.said,
        "factor": limit.factor,
        "of": what,
        "measured": ratio,
        "tried": tried,
        "dense_seconds": whole,
        "layer_times": file,
        "sparsity": trial.recipe.sparsity,
    }
    note = (
        f"--speedup {limit.said} ({what}): {ratio:.3f} x as fast as dense, measured in {ROUNDS} turns, at sparsity "
        f"{trial.recipe.sparsity:.6g}; times of layers are kept in {file}"
    )
    return Sized(recipe=trial.recipe, decided=Decided(counts=trial.counts), asked=asked, notes=[note])


def _typical(dense: Any, limit: Speedup) -> float:
    """Seconds of the dense shapes, after one run to warm up: the median of a few."""
    run_seconds(dense, limit)
    times = sorted(run_seconds(dense, limit) for _ in range(5))
    return times[len(times) // 2]


def _planned(sizer: Sizer, times: Times, wanted: float, limit: Speedup) -> Trial:
    """The plan that saves so many seconds and removes least, or does least damage where that was priced.

    Raises:
        BudgetError: the sites cannot save that much; says how much they can.
    """
    most = _saved(times, sizer.whole.job.sites, sizer.most().counts)
    if most < wanted:
        raise BudgetError(
            f"--speedup {limit.said}: the narrowest sites save {most * 1e3:.3g} ms of a run, and {wanted * 1e3:.3g} ms "
            "must go: the rest is outside of units. Ask for less."
        )
    if sizer.outlook is not None and sizer.recipe.per_block and not sizer.recipe.searches_widths:
        return _by_damage(sizer, sizer.outlook, times, wanted)
    return least_trial(sizer, lambda trial: _saved(times, trial.job.sites, trial.counts) >= wanted)


def _by_damage(sizer: Sizer, outlook: Outlook, times: Times, wanted: float) -> Trial:
    """The knapsack of the recipe's allocator in microseconds in place of parameters."""
    job = sizer.whole.job
    needs = ALLOCATORS[sizer.recipe.allocator].needs
    if needs in (None, *PER_UNIT):
        return least_trial(sizer, lambda trial: _saved(times, trial.job.sites, trial.counts) >= wanted)
    budget = replace(job.budget, target=max(1, round(wanted * MICRO)))
    sizes = {
        site.key: [round(saved_seconds(times, site, site.n_units - o) * MICRO) for o in budget.options(site)]
        for site in job.sites
    }
    counts, _ = knapsack(job.sites, budget, outlook.measured(needs, job, sizer.recipe), sizes)
    chosen = with_counts(job, counts)
    return replace(sizer.whole, recipe=sizer.recipe_at(chosen.budget.target), job=chosen)


def _saved(times: Times, sites: Sequence[Site], counts: Counts) -> float:
    return sum(saved_seconds(times, site, counts[site.key]) for site in sites)
