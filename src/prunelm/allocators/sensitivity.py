"""Least divergence at the output: errors are priced by what they do to the model's predictions."""

from collections.abc import Sequence

from ..knapsack import knapsack
from ..plan import Budget, Counts
from ..sites import Site
from . import Measured, allocator


@allocator("sensitivity", needs="damage")
def sensitivity(sites: Sequence[Site], budget: Budget, damage: Measured) -> tuple[Counts, int]:
    """The widths with the least summed KL to the dense model, attention and FFN together, by an exact knapsack.

    The price of a site is measured, by forward passes only: one site at a time is pruned and repaired at two sizes,
    and KL = A x error^p is put through both (see `prunelm.sensitivity`).

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    return knapsack(sites, budget, damage)
