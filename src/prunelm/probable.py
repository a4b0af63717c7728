"""The plan that keep probabilities make: what is least likely to stay goes, until the budget is met."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import BudgetError
from .plan import Budget, Counts
from .policy import Policy
from .sites import Site, by_block
from .variables import pools_of, targets_of


def most_probable(
    sites: Sequence[Site], budget: Budget, scores: Mapping[str, Float[Tensor, " unit"]], policy: Policy
) -> tuple[Counts, int]:
    """Kept units per site, and the smallest step that no longer fitted.

    Steps between the widths that a site may have are taken in ascending order of their units' mean score, each as far
    as its pool's target goes; of equal scores the earlier site loses first. What whole units leave of attention's
    target, FFN pays.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    options = {site.key: _options(site, budget, policy) for site in sites}
    counts = {site.key: site.n_units - options[site.key][0] for site in sites}
    pools = pools_of(sites, policy)
    left, missed = 0, 1
    for pool, target in enumerate(targets_of(sites, budget, policy)):
        mine = [site for site in sites if pools[site.key] == pool]
        left += target - sum((site.n_units - counts[site.key]) * site.cost for site in mine)
        left, missed = _taken(mine, options, scores, counts, left)
    if missed > budget.target or left >= missed:
        most = sum(options[site.key][-1] * site.cost for site in sites)
        raise BudgetError(
            f"sparsity {budget.share(budget.target)} ({budget.target:,} parameters) cannot be met by whole units: "
            f"{budget.target - left:,} would go, and at most {most:,} can. Ask for a share that fits, or use a policy "
            "with pool 'all'."
        )
    return counts, missed


def _options(site: Site, budget: Budget, policy: Policy) -> list[int]:
    """Numbers of units that may go: all or none of a sublayer, where whole ones are what a policy decides on."""
    options = budget.options(site)
    if policy.layers != "sublayer":
        return options
    return [options[0], site.n_units] if options[-1] == site.n_units > options[0] else options[:1]


def _taken(
    sites: Sequence[Site],
    options: Mapping[str, list[int]],
    scores: Mapping[str, Float[Tensor, " unit"]],
    counts: Counts,
    left: int,
) -> tuple[int, int]:
    """What remains of a pool's target after its least likely steps went, and the smallest step that did not fit."""
    steps = []
    for n, site in enumerate(sites):
        ordered = scores[site.key].double().sort().values
        steps += [(float(ordered[a:b].mean()), n, a, b) for a, b in pairwise(options[site.key])]
    stopped, missed = set(), list[int]()
    for _, n, a, b in sorted(steps):
        size = (b - a) * sites[n].cost
        if n in stopped:
            continue
        if size > left:
            stopped.add(n)
            missed.append(size)
            continue
        counts[sites[n].key] = sites[n].n_units - b
        left -= size
    return left, min(missed, default=1)


def least_probable_blocks(
    sites: Sequence[Site], budget: Budget, scores: Mapping[str, Float[Tensor, " unit"]]
) -> tuple[list[int], int]:
    """The blocks to drop, ascending, and the parameters of units in the next one, which would be too many."""
    sizes = block_sizes(sites)
    likely = {i: float(torch.stack([scores[s.key].mean() for s in sites if s.block == i]).mean()) for i in sizes}
    left, dropped = budget.target, list[int]()
    for i in sorted(sizes, key=lambda i: (likely[i], i)):
        if sizes[i] > left:
            return sorted(dropped), sizes[i]
        dropped.append(i)
        left -= sizes[i]
    return sorted(dropped), left + 1


def block_sizes(sites: Sequence[Site]) -> dict[int, int]:
    """The parameters of every block's units, which sparsity is a share of; norms go as well but are not counted."""
    return {i: sum(site.cost * site.n_units for site in mine) for i, mine in by_block(sites).items()}


def check_block_budget(sites: Sequence[Site], budget: Budget, blocks: int) -> None:
    """Raise unless the budget takes some block whole, and leaves one of all `blocks`.

    Raises:
        BudgetError: with the size of a block, and what can be asked for.
    """
    sizes = sorted(block_sizes(sites).values())
    most = sum(sizes if len(sizes) < blocks else sizes[:-1])
    what = f"sparsity {budget.share(budget.target)} ({budget.target:,} parameters) cannot be met by whole blocks: "
    if budget.target < sizes[-1]:
        raise BudgetError(f"{what}one has {sizes[-1]:,}, so ask for at least {budget.share(sizes[-1])}.")
    if budget.target > most:
        raise BudgetError(f"{what}at most {most:,} can go, so ask for at most {budget.share_below(most)}.")
