"""Structured OBS: the order of removal that exact least-squares repair makes cheapest, one unit at a time."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..elimination import eliminate
from ..errors import RecipeError
from ..moments import output_energy
from ..placement import exact
from ..sites import Site, bias_of, weight_of
from ..solver import energy_damping, factored
from . import Statistics, criterion


def _needs(*, metric: str = "module", shrink: float = 0.3, ridge: float = 1e-2) -> set[str]:
    if metric not in ("module", "output"):
        raise RecipeError(f"obs: metric must be module or output, got {metric!r}")
    if not 0 <= shrink <= 1:
        raise RecipeError(f"obs: shrink must be in [0, 1], got {shrink}")
    if not 0 <= ridge < math.inf:
        raise RecipeError(f"obs: ridge must be a number from 0 up, got {ridge}")
    return {"gram", "fisher"} if metric == "output" else {"gram"}


@criterion("obs", needs=_needs, curve=True)
def obs(
    site: Site, statistics: Statistics, *, metric: str = "module", shrink: float = 0.3, ridge: float = 1e-2
) -> Float[Tensor, " unit"]:
    """Relative error of the module once this unit and all before it are removed and the rest is refitted.

    Greedy backward elimination with exact downdates: the unit g with the least tr(W_g (P_gg)^-1 W_g^T) goes next,
    P the inverse of the damped second moment of the consumer's input (covariance where it has a bias). The score is
    the running sum over E||W x||^2, so the sorted scores are the site's error curve. One Cholesky and n^3 of matrix
    products, in float64.

    Args:
        metric: `module` measures errors in the module's own output; `output` in the model's, to second order:
            ||d||^2 becomes d^T G d with the Fisher matrix G of the consumer's output (see `prunelm.fisher`).
        shrink: of G towards a multiple of the identity, which is the metric `module`; it comes from few tokens.
        ridge: damping of each channel, relative to its energy; more where that cannot be inverted.

    Raises:
        CalibrationError: it cannot be inverted even so; says how many tokens would do.

    Source: arXiv 2302.04089 (ZipLM's structured OBS); the metric `output` is ours.
    Differs: damping per channel, relative to its energy; one pass gives every size.
    """
    assert statistics.consumer is not None
    moments = statistics.consumer
    weight = exact(weight_of(site.consumer.layer))
    if metric == "output":
        assert statistics.fisher is not None
        weight = _root(statistics.fisher, shrink).T @ weight
    bias = bias_of(site.consumer.layer)
    second = moments.fitted(bias)
    whole = output_energy(weight, second).clamp_min(1e-300)
    damping, least = energy_damping(second, ridge), moments.rounding(bias)
    root, _ = factored(second, damping, tokens=moments.tokens, least=least)
    inverse = torch.cholesky_inverse(root)
    del second, root  # large, and not needed beside it
    order, costs = eliminate(weight, inverse, site.consumer.index, strata=site.strata)
    scores = torch.empty_like(costs)
    scores[order] = costs.cumsum(0)
    return scores / whole


def _root(fisher: Float[Tensor, "out out"], shrink: float) -> Float[Tensor, "out out"]:
    """L with L L^T = (1 - shrink) G + shrink x (mean diagonal of G) I."""
    mean = fisher.diagonal().mean().clamp_min(1e-30)
    shrunk = (1 - shrink) * fisher + torch.diag(max(shrink, 1e-6) * mean.expand(len(fisher)))
    root: Tensor = torch.linalg.cholesky(shrunk)
    return root
