"""Least summed error: every site gives up to where its error curve is as steep, per parameter, as all others."""

from collections.abc import Sequence

from ..knapsack import knapsack
from ..plan import Budget, Counts
from ..sites import Site
from . import Measured, allocator


@allocator("error-curve", needs="curves")
def error_curve(sites: Sequence[Site], budget: Budget, curves: Measured) -> tuple[Counts, int]:
    """The widths with the least sum of relative errors, by an exact knapsack over the sites' error curves.

    A relative error counts the same in every site, whatever it does to the output: `sensitivity` prices it.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.
    """
    return knapsack(sites, budget, curves)
