"""Least expected divergence at the output: errors are priced by the Fisher matrix of one backward pass."""

from collections.abc import Sequence

from ..knapsack import knapsack
from ..plan import Budget, Counts
from ..sites import Site
from . import Measured, allocator


@allocator("fisher", needs="curvature")
def fisher(sites: Sequence[Site], budget: Budget, curvature: Measured) -> tuple[Counts, int]:
    """The widths with the least summed 1/2 error x tr(G W C W^T), attention and FFN together, by an exact knapsack.

    To second order that is the divergence of the output: G from labels that the model draws, C the second moment of
    the consumer's input (covariance where it has a bias), error the site's error curve. Cheap, blind to how sites act
    together: a start for descent.

    Raises:
        BudgetError: the sites cannot lose that much; says how much they can.

    Source: ours; G is the output factor of arXiv 1503.05671.
    """
    return knapsack(sites, budget, curvature)
