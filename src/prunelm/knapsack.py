"""Budgets as a knapsack: the widths whose summed damage is least, exactly or to within a stated rounding."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import BudgetError
from .plan import Budget, Counts
from .sites import Site

STATES = 100_000
"""Sums of removed parameters that are told apart; more are rounded up to this many."""
WINDOW = 200
"""Of a budget in other sizes than parameters, one part in so many may stay unspent where that does less damage."""


def knapsack(
    sites: Sequence[Site],
    budget: Budget,
    damage: Mapping[str, Float[Tensor, " option"]],
    sizes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[Counts, int]:
    """Kept units per site with the least total damage among all plans that meet the budget, and one step of it.

    Dynamic programming over the sites: least[r] is the least damage that removes exactly r parameters, in units of
    the costs' common divisor. Where that makes more than 100,000 sums, costs are rounded up to a coarser unit, which
    can leave up to `len(sites)` units unspent; they are then spent where they do least damage.

    Args:
        sites: that may lose units.
        budget: what must go.
        damage: per site, a number for each of `budget.options(site)`; 0 for removing nothing.
        sizes: per site, what each option counts towards the budget, never falling; its parameters by default.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    options = {site.key: budget.options(site) for site in sites}
    if sizes is None:
        step = least_step(sites, budget)
        sizes = {site.key: [site.cost * o for o in options[site.key]] for site in sites}
    else:
        step = max(1, budget.target // WINDOW)
    least_sizes = {site.key: sizes[site.key][0] for site in sites}
    room = budget.target - sum(least_sizes.values())
    if room < 0:
        raise BudgetError(f"at least {budget.target - room:,} must go, and the budget says {budget.target:,}.")
    more = {site.key: [size - least_sizes[site.key] for size in sizes[site.key]] for site in sites}
    unit = max(math.gcd(*(size for site in sites for size in more[site.key])), -(-budget.target // STATES))
    top = room // unit
    least = torch.full((top + 1,), torch.inf, dtype=torch.float64)
    least[0] = 0.0
    choices = []
    for site in sites:
        best, choice = torch.full_like(least, torch.inf), torch.zeros(top + 1, dtype=torch.long)
        for n, size in enumerate(more[site.key]):
            cost = -(-size // unit)
            if cost > top:
                break
            reached = least[: top + 1 - cost] + float(damage[site.key][n])
            better = reached < best[cost:]
            best[cost:] = torch.where(better, reached, best[cost:])
            choice[cost:] = torch.where(better, n, choice[cost:])
        least = best
        choices.append(choice)
    taken = _trace(sites, more, choices, unit, _best_sum(least, step, unit))
    _fill(sites, budget, sizes, damage, taken)
    counts = {site.key: site.n_units - options[site.key][taken[site.key]] for site in sites}
    return counts, next_step(sites, options, taken, step)


def _best_sum(least: Float[Tensor, " sum"], step: int, unit: int) -> int:
    """The sum with the least damage among those within one step of the largest that can be reached."""
    reached = torch.isfinite(least).nonzero().flatten()
    window = reached[reached > int(reached[-1]) - max(1, step // unit)]
    return int(window[least[window].argmin()])


def _trace(
    sites: Sequence[Site], sizes: Mapping[str, Sequence[int]], choices: Sequence[Tensor], unit: int, end: int
) -> dict[str, int]:
    """The option of each site that led to a sum."""
    taken = {}
    for site, choice in zip(reversed(sites), reversed(choices), strict=True):
        taken[site.key] = int(choice[end])
        end -= -(-sizes[site.key][taken[site.key]] // unit)
    return taken


def _fill(
    sites: Sequence[Site],
    budget: Budget,
    sizes: Mapping[str, Sequence[int]],
    damage: Mapping[str, Float[Tensor, " option"]],
    taken: dict[str, int],
) -> None:
    """Take further steps, cheapest damage per parameter first, while they fit the budget."""
    left = budget.target - sum(sizes[s.key][taken[s.key]] for s in sites)
    while True:
        fits = []
        for site in sites:
            now, mine = taken[site.key], sizes[site.key]
            if now + 1 < len(mine) and 0 < mine[now + 1] - mine[now] <= left:
                size = mine[now + 1] - mine[now]
                fits.append((float(damage[site.key][now + 1] - damage[site.key][now]) / size, site.key, size))
        if not fits:
            return
        _, key, size = min(fits)
        taken[key] += 1
        left -= size


def least_step(sites: Sequence[Site], budget: Budget) -> int:
    """The fewest parameters between neighbouring options of any site.

    Raises:
        BudgetError: the sites cannot lose that much, or nothing would go; says what can be asked for.
    """
    options = {site.key: budget.options(site) for site in sites}
    most = sum(options[site.key][-1] * site.cost for site in sites)
    step = min(((b - a) * site.cost for site in sites for a, b in pairwise(options[site.key])), default=0)
    if step == 0 or budget.target < step or most <= budget.target - step:
        raise BudgetError(_unmet(budget, step, most))
    return step


def next_step(sites: Sequence[Site], options: Mapping[str, list[int]], taken: Mapping[str, int], least: int) -> int:
    """The fewest parameters that one more step of some site would remove; `least` where nothing more can go."""
    sizes = []
    for site in sites:
        mine, now = options[site.key], taken[site.key]
        if now + 1 < len(mine):
            sizes.append((mine[now + 1] - mine[now]) * site.cost)
    return max(least, min(sizes, default=least))


def _unmet(budget: Budget, step: int, most: int) -> str:
    """One line that says which budgets can be met."""
    what = f"sparsity {budget.share(budget.target)} ({budget.target:,} parameters) cannot be met by whole units: "
    if budget.target < step or step == 0:
        return f"{what}nothing would go. One step is {step:,}, so ask for at least {budget.share(step)}."
    return f"{what}at most {most:,} can go, so ask for at most {budget.share_below(most)}."
