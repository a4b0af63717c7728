"""GOA's refit of a still dense linear layer on the inputs it really gets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..solver import damped_fit
from . import CrossMoments, Layer, reconstruction


@reconstruction("two-step", stage="refit")
def two_step(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    kept: Int[Tensor, " kept"],
    *,
    ridge: float = 1e-2,
) -> Layer:
    """Argmin over W', b' of E||y - W' x - b'||^2 + lam ||W' - W||^2: the layer refitted to dense outputs.

    W' = (E[y x^T] + lam W)(E[x x^T] + lam I)^-1, lam = ridge x mean diagonal of E[x x^T]; where the layer has a bias
    the moments are centered and b' = E[y] - W' E[x]. One Cholesky of channel x channel, in float64.

    The driver applies it to the producers (step 1: y = their dense outputs, x = the drifted input), then to the
    consumer (step 2: x = its input recomputed with the new producers), before the module is scored and pruned.
    The error on the calibration tokens never rises. `kept` is every column: a refit removes nothing.

    Source: arXiv 2407.19126, Algorithms 1, 3 and 4.
    Differs: ridge towards the present weights, biases and centring (not in the paper, which is rank deficient with
    its default 2,048 tokens); the printed (X X^T)^-1 X^T Y reads (X^T X)^-1 X^T Y.

    Raises:
        CalibrationError: the moments cannot be factored even with ten thousand times the ridge.
    """
    n = moments.x.tokens
    second, cross = moments.x.gram, moments.cross
    if bias is not None:
        mean_x, mean_y = moments.x.mean, moments.y_total / n
        second = moments.x.covariance * n
        cross = cross - torch.outer(moments.y_total, mean_x)
    scale = float(second.diagonal().mean())
    if scale == 0:
        return weight[:, kept], bias
    damping = second.new_full((len(second),), ridge * scale)
    fit = damped_fit(second, cross, weight, damping, tokens=n)
    if bias is None:
        return fit[:, kept], None
    return fit[:, kept], (mean_y - fit.to(mean_x) @ mean_x).to(bias)
