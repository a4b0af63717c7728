"""LIAR's repair: the kept units take over what the removed ones can be predicted to have given."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..solver import NestedFits, damped_fit, energy_damping
from . import CrossMoments, Layer, reconstruction


def nested(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    order: Int[Tensor, " kept"],
    *,
    ridge: float = 1e-2,
) -> Callable[[int], Layer]:
    """`least_squares` over the first channels of an order, for any number of them: one Cholesky serves all."""
    second, cross = _system(bias, moments, order)
    fits = NestedFits(second, cross, weight[:, order], energy_damping(second, ridge), tokens=moments.x.tokens)

    def first(count: int) -> Layer:
        fit = fits.first(count)
        return fit, _mean_error(fit, bias, moments, order[:count])

    return first


@reconstruction("least-squares", guards=("none", "bias"), nested=nested)
def least_squares(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    kept: Int[Tensor, " kept"],
    *,
    ridge: float = 1e-2,
) -> Layer:
    """Argmin over V, v of E||y - V x_kept - v||^2 + sum_j D_j ||V_j - W_j||^2, D_j = ridge x E[x_j^2].

    With y = W x + b this is V = W_u + W_r C_ru (C_uu + D)^-1 up to the damping: removed activations are interpolated
    from the kept ones (LIAR's Q), and their unpredicted mean goes into the bias (LIAR's P). Layers with a bias use
    the covariance, v = E[y] - V E[x_kept]; the others the second moment. One Cholesky of kept x kept in float64.

    Source: arXiv 2407.13331 (its abstract; the closed form is derived).
    Differs: the pull towards the present weights is per channel, relative to its energy.

    Raises:
        CalibrationError: the kept channels' moments cannot be factored.
    """
    second, cross = _system(bias, moments, kept)
    damping = energy_damping(second, ridge)
    fit = damped_fit(second, cross, weight[:, kept], damping, tokens=moments.x.tokens)
    return fit, _mean_error(fit, bias, moments, kept)


def _system(
    bias: Float[Tensor, " out"] | None, moments: CrossMoments, kept: Int[Tensor, " kept"]
) -> tuple[Float[Tensor, "kept kept"], Float[Tensor, "out kept"]]:
    """The kept channels' summed products with each other, and with the target; about means where there is a bias."""
    second, cross = moments.x.gram, moments.cross[:, kept]
    if bias is not None:
        second = moments.x.covariance * moments.x.tokens
        cross = cross - torch.outer(moments.y_total, moments.x.mean[kept])
    return second[kept][:, kept], cross


def _mean_error(
    fit: Float[Tensor, "out kept"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    kept: Int[Tensor, " kept"],
) -> Float[Tensor, " out"] | None:
    """The bias that makes the mean error zero, where there is a bias."""
    if bias is None:
        return None
    mean = moments.x.mean
    return (moments.y_total / moments.x.tokens - fit.to(mean) @ mean[kept]).to(bias)
