"""Allocators: how many units stay in each site, so that the budget is met. One file each, one function."""

from collections.abc import Callable, Sequence
from typing import Protocol

from ..plan import Budget, Counts
from ..registry import Registry
from ..sites import Site


class Allocator(Protocol):
    """`(sites, budget) -> kept units per site`; `slack` says how far below the target it may stay."""

    def __call__(self, sites: Sequence[Site], budget: Budget) -> tuple[Counts, int]:
        """Kept units per site, and one step of the budget in parameters."""
        ...


ALLOCATORS: Registry[Allocator] = Registry("allocator", "prunelm.allocators")


def allocator(name: str) -> Callable[[Allocator], Allocator]:
    """A decorator that registers `(sites, budget) -> (kept units per site, one step in parameters)`."""
    return ALLOCATORS(name)


__all__ = ["ALLOCATORS", "Allocator", "allocator"]
