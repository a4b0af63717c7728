"""Reconstructions: closed-form changes to the weights that stay. One file each, one function."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from ..moments import CrossMoments
from ..registry import Registry

STAGES = ("none", "refit", "repair")
Layer = tuple[Float[Tensor, "out kept"], Float[Tensor, " out"] | None]
Solve = Callable[..., Layer]
Nested = Callable[..., Callable[[int], Layer]]


@dataclass(frozen=True)
class Reconstruction:
    """A registered solve and when it runs.

    `stage`: `refit` (the still dense module, producers then consumer, before it is scored), `repair` (the consumer,
    when units go), or `none`. `guards`: for repairs, the milder reconstructions that held-out tokens may prefer.
    `solves`: whether it needs as many tokens as channels. `nested`: for repairs, the same solve for any number of
    leading channels of an order, where one factorization gives them all. `only_biases`: whether it leaves layers
    without a bias alone.
    """

    name: str
    solve: Solve
    stage: str
    guards: tuple[str, ...] = ()
    solves: bool = True
    nested: Nested | None = None
    only_biases: bool = False

    def __call__(
        self,
        weight: Float[Tensor, "out channel"],
        bias: Float[Tensor, " out"] | None,
        moments: CrossMoments,
        kept: Int[Tensor, " kept"],
        *,
        ridge: float,
    ) -> Layer:
        """The weight over the kept columns, and the bias."""
        return self.solve(weight, bias, moments, kept, ridge=ridge)


RECONSTRUCTIONS: Registry[Reconstruction] = Registry("reconstruction", "prunelm.reconstructions")


def reconstruction(
    name: str,
    *,
    stage: str = "repair",
    guards: tuple[str, ...] = (),
    solves: bool = True,
    nested: Nested | None = None,
    only_biases: bool = False,
) -> Callable[[Solve], Solve]:
    """A decorator that registers `(weight, bias, moments, kept columns, *, ridge) -> (weight, bias)`.

    Args:
        name: what recipes call it.
        stage: `repair`, `refit` or `none`; see `Reconstruction`.
        guards: milder reconstructions to fall back on where held-out tokens say so.
        solves: whether it needs at least as many tokens as channels; text that gives fewer is then refused.
        nested: `(weight, bias, moments, order of columns, *, ridge) -> (number of columns -> (weight, bias))`, the same
            solve for the first columns of an order, so that searches need not start again for every number.
        only_biases: whether it changes nothing in a layer without a bias; runs on such layers are told so.
    """
    if stage not in STAGES:
        raise ValueError(f"reconstruction {name!r}: stage must be one of {', '.join(STAGES)}, got {stage!r}")

    def adopted(solve: Solve) -> Solve:
        item = Reconstruction(name, solve, stage, guards, solves, nested, only_biases)
        return RECONSTRUCTIONS.adopt(name, item, solve)

    return adopted


__all__ = ["RECONSTRUCTIONS", "CrossMoments", "Layer", "Reconstruction", "reconstruction"]
