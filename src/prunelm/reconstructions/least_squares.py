"""LIAR's repair: the kept units take over what the removed ones can be predicted to have given."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..solver import damped_fit, energy_damping
from . import CrossMoments, Layer, reconstruction


@reconstruction("least-squares", guards=("none", "bias"))
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
    n = moments.x.tokens
    second, cross = moments.x.gram, moments.cross[:, kept]
    if bias is not None:
        mean_x, mean_y = moments.x.mean, moments.y_total / n
        second = moments.x.covariance * n
        cross = cross - torch.outer(moments.y_total, mean_x[kept])
    second = second[kept][:, kept]
    damping = energy_damping(second, ridge)
    fit = damped_fit(second, cross, weight[:, kept], damping, tokens=n)
    if bias is None:
        return fit, None
    return fit, (mean_y - fit.to(mean_x) @ mean_x[kept]).to(bias)
