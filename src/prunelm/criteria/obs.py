"""Structured OBS: the order of removal that exact least-squares repair makes cheapest, one unit at a time."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..elimination import eliminate
from ..sites import Site, bias_of, weight_of
from ..solver import energy_damping
from . import Statistics, criterion


@criterion("obs", needs={"gram"}, curve=True)
def obs(site: Site, statistics: Statistics, *, ridge: float = 1e-2) -> Float[Tensor, " unit"]:
    """Relative error of the module once this unit and all before it are removed and the rest is refitted.

    Greedy backward elimination with exact downdates: the unit g with the least tr(W_g (P_gg)^-1 W_g^T) goes next,
    P the inverse of the damped second moment of the consumer's input (covariance where it has a bias). The score is
    the running sum over E||W x||^2, so the sorted scores are the site's error curve. One Cholesky and n^3 of matrix
    products, in float64.

    Source: arXiv 2302.04089 (ZipLM's structured OBS).
    Differs: damping per channel, relative to its energy; one pass gives every size.
    """
    assert statistics.consumer is not None
    moments = statistics.consumer
    weight = weight_of(site.consumer.layer).double()
    second = moments.second_moment if bias_of(site.consumer.layer) is None else moments.covariance
    damped = second + torch.diag(energy_damping(second, ridge))
    order, costs = eliminate(weight, damped, site.consumer.index, strata=site.strata)
    scores = torch.empty_like(costs)
    scores[order] = costs.cumsum(0)
    return scores / ((weight @ second) * weight).sum().clamp_min(1e-300)
