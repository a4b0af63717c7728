"""The same share of every module, block by block, as in GOA's experiments."""

from collections.abc import Sequence

from ..errors import BudgetError
from ..plan import Budget, Counts, largest_option
from ..sites import Site, by_block
from . import allocator


@allocator("per-module")
def per_module(sites: Sequence[Site], budget: Budget) -> tuple[Counts, int]:
    """The same share of each site, rounded down; the last site of a block also pays what is owed so far.

    Widths may differ by a unit between blocks, so the result is a per-block checkpoint.

    Source: arXiv 2407.19126 prunes each module of a block range by one ratio.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    counts: Counts = {}
    owed = 0.0
    groups = list(by_block(sites).values())
    for group in groups:
        owed += budget.sparsity * sum(site.cost * site.n_units for site in group)
        for site in group:
            removed = _removed(site, group, owed, budget)
            counts[site.key] = site.n_units - removed
            owed -= removed * site.cost
    last = groups[-1][-1]
    step = budget.step(last)
    removed_all = sum((site.n_units - counts[site.key]) * site.cost for site in sites)
    if removed_all == 0 or not 0 <= budget.target - removed_all < step:
        most = sum(budget.options(site)[-1] * site.cost for site in sites)
        raise BudgetError(
            f"sparsity {budget.share(budget.target)} ({budget.target:,} parameters) cannot be met by whole units: "
            f"{removed_all:,} would go. One step ({last.key}) is {step:,}; at most {most:,} can go, so ask for "
            f"between {budget.share(step)} and {budget.share_below(most)}."
        )
    return counts, step


def _removed(site: Site, group: Sequence[Site], owed: float, budget: Budget) -> int:
    """Units that a site loses: its share, more where the sites after it in the block cannot pay the rest."""
    later = group[group.index(site) + 1 :]
    if not later:
        return largest_option(budget.options(site), owed / site.cost)
    options = budget.options(site)
    share = largest_option(options, budget.attention_share * budget.sparsity * site.n_units)
    payable = sum(budget.options(other)[-1] * other.cost for other in later)
    least = next((o for o in options if owed - o * site.cost <= payable), options[-1])
    return largest_option(options, float(min(max(share, least), owed / site.cost)))
