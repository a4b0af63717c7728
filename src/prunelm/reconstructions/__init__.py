"""Reconstructions: closed-form changes to the weights that stay. One file each, one function."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from ..moments import CrossMoments
from ..registry import Registry

Refit = Callable[..., tuple[Float[Tensor, "out channel"], Float[Tensor, " out"] | None]]
"""(weight, bias, moments of targets and drifted inputs, *, ridge) -> (weight, bias) of the same shapes."""

RECONSTRUCTIONS: Registry[Refit] = Registry("reconstruction", "prunelm.reconstructions")


def reconstruction(name: str) -> Callable[[Refit], Refit]:
    """A decorator that registers `(weight, bias, moments, *, ridge) -> (weight, bias)`."""
    return RECONSTRUCTIONS(name)


__all__ = ["RECONSTRUCTIONS", "CrossMoments", "Refit", "reconstruction"]
