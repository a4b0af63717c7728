"""Allocators: how many units stay in each site, so that the budget is met. One file each, one function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ..plan import Budget, Counts
from ..registry import Registry
from ..sites import Site

PER_UNIT = ("scores", "standardised")
"""Measures with a number for every unit; the others have one for every number of units that may go."""
MEASURES = (*PER_UNIT, "curves", "damage", "curvature")
Allocate = Callable[..., tuple[Counts, int]]
Measured = Mapping[str, Float[Tensor, " number"]]


@dataclass(frozen=True)
class Allocator:
    """A registered division of the budget, and what must have been measured on the dense model for it.

    `needs`: None (sizes only); `scores`, one per unit of a site; `standardised`, these less their mean and in standard
    deviations of the site; `curves`, the relative error of the module with each of its `budget.options(site)` removed;
    `damage`, the price of the same in divergence at the model's output, measured by forward passes; or `curvature`,
    that price to second order, by the Fisher matrix of one backward pass.
    `even`: widths are the same in every block, as plain loaders want them.
    """

    name: str
    allocate: Allocate
    needs: str | None = None
    even: bool = False

    def __call__(self, sites: Sequence[Site], budget: Budget, *measured: Measured) -> tuple[Counts, int]:
        """Kept units per site, and one step of the budget in parameters."""
        return self.allocate(sites, budget, *measured)


ALLOCATORS: Registry[Allocator] = Registry("allocator", "prunelm.allocators")


def allocator(name: str, *, needs: str | None = None, even: bool = False) -> Callable[[Allocate], Allocate]:
    """A decorator that registers `(sites, budget[, what it needs]) -> (kept units per site, one step in parameters)`.

    Args:
        name: what recipes call it.
        needs: None, `scores`, `standardised`, `curves`, `damage` or `curvature`; see `Allocator`.
        even: whether its widths are the same in every block.
    """
    if needs is not None and needs not in MEASURES:
        raise ValueError(f"allocator {name!r} needs {needs!r}, but only {', '.join(MEASURES)} can be measured")

    return lambda allocate: ALLOCATORS.adopt(name, Allocator(name, allocate, needs, even), allocate)


__all__ = ["ALLOCATORS", "PER_UNIT", "Allocator", "Measured", "allocator"]
