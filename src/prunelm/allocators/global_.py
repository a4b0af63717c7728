"""FLAP's allocation: standardised scores, one threshold for the whole model."""

import heapq
from collections.abc import Sequence

from ..knapsack import least_step, next_step
from ..plan import Budget, Counts
from ..sites import Site
from . import Measured, allocator


@allocator("global", needs="standardised")
def global_(sites: Sequence[Site], budget: Budget, standardised: Measured) -> tuple[Counts, int]:
    """The units with the lowest z = (score - mean) / std within their site, until the budget is spent.

    The std is that of the units' scores, but of the site's channels with criterion `flap`, as in its paper. A step of
    several units (a multiple of channels, one query head from every group) goes at its highest z. Costs are counted in
    parameters, so heads and channels compete fairly.

    Source: arXiv 2312.11983, its adaptive search over all layers and modules.
    Differs: the budget is met within one step; the cost of a head is counted, not a fixed ratio.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    options = {site.key: budget.options(site) for site in sites}
    step = least_step(sites, budget)
    by_key = {site.key: site for site in sites}
    ranked = {}
    for site in sites:
        z = standardised[site.key]
        ranked[site.key] = z.reshape(site.strata, -1).sort(1).values.max(0).values.repeat_interleave(site.strata)
    taken = dict.fromkeys(by_key, 0)
    waiting = [(float(ranked[key][options[key][1] - 1]), key) for key in by_key if len(options[key]) > 1]
    heapq.heapify(waiting)
    left = budget.target - sum(options[key][0] * site.cost for key, site in by_key.items())
    while waiting:
        _, key = heapq.heappop(waiting)
        now = options[key][taken[key] : taken[key] + 3]
        size = (now[1] - now[0]) * by_key[key].cost
        if size > left:
            continue
        taken[key] += 1
        left -= size
        if len(now) > 2:
            heapq.heappush(waiting, (float(ranked[key][now[2] - 1]), key))
    counts = {key: by_key[key].n_units - options[key][n] for key, n in taken.items()}
    return counts, next_step(sites, options, taken, step)
