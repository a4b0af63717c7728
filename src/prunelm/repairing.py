"""The repair of one consumer: how much damping, and whether to repair at all, decided by tokens held out."""

from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from .distributed import agreed_number
from .exchange import exchanged
from .moments import CrossMoments, Moments
from .reconstructions import RECONSTRUCTIONS, Layer, Reconstruction
from .sites import Site, bias_of, weight_of
from .solver import energy_damping, factored

LEAST, MOST = 1e-6, 1e2
"""Ridges that the search for the best one does not leave."""


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """The new layer, which reconstruction and ridge made it, and what each candidate's relative error was.

    `errors` are measured on held-out tokens, or on the tokens fitted where none were held out.
    """

    weight: Float[Tensor, "out kept"]
    bias: Float[Tensor, " out"] | None
    how: str
    ridge: float
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """Of the layer itself."""
        return self.errors[self.how]


def exchanged_units(
    site: Site, moments: Moments, kept: Int[Tensor, " kept"], *, limit: int, ridge: float
) -> tuple[Int[Tensor, " kept"], int]:
    """The kept units of a site after at most `limit` exchanges that lower its refitted error, and how many it took."""
    bias = bias_of(site.consumer.layer)
    second = moments.fitted(bias)
    damping, least = energy_damping(second, ridge), moments.rounding(bias)
    _, damping = factored(second, damping, tokens=moments.tokens, least=least)
    second.diagonal().add_(damping)
    weight = weight_of(site.consumer.layer).detach()
    return exchanged(weight, second, site.consumer.index, kept, limit=limit, strata=site.strata)


def repaired(
    reconstruction: Reconstruction,
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    fit: CrossMoments,
    held: CrossMoments | None,
    kept: Int[Tensor, " kept"],
    *,
    ridge: float,
) -> Repaired:
    """The layer over its kept columns that does best on held-out tokens.

    The ridge starts at `ridge` and moves by factors of ten while the held-out error falls; the reconstruction's
    guards (none, bias only) are candidates too, so the result is never worse on those tokens than they are. Without
    held-out moments the given ridge is taken as it is.

    Raises:
        CalibrationError: the kept channels' moments cannot be factored.
    """
    judge = fit if held is None else held
    tried: dict[float, tuple[Layer, float]] = {}

    def error_at(now: float) -> float:
        if now not in tried:
            layer = reconstruction(weight, bias, fit, kept, ridge=now)
            tried[now] = layer, agreed_number(judge.residual(*layer, kept))
        return tried[now][1]

    best = ridge
    error_at(best)
    if held is not None and ridge > 0 and reconstruction.solves:
        for factor in (10.0, 0.1):
            while LEAST <= best * factor <= MOST and error_at(best * factor) < error_at(best):
                best *= factor
    layer, error = tried[best]
    found = Repaired(weight=layer[0], bias=layer[1], how=reconstruction.name, ridge=best)
    errors = {reconstruction.name: error}
    for name in reconstruction.guards if held is not None else ():
        milder = RECONSTRUCTIONS[name](weight, bias, fit, kept, ridge=0.0)
        errors[name] = agreed_number(judge.residual(*milder, kept))
        if errors[name] < min(errors[other] for other in errors if other != name):
            found = Repaired(weight=milder[0], bias=milder[1], how=name, ridge=0.0)
    return Repaired(weight=found.weight, bias=found.bias, how=found.how, ridge=found.ridge, errors=errors)
