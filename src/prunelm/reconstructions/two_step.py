"""GOA's refit of a still dense linear layer on the inputs it really gets."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import CalibrationError
from . import CrossMoments, reconstruction


@reconstruction("two-step")
def two_step(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    *,
    ridge: float = 1e-2,
) -> tuple[Float[Tensor, "out channel"], Float[Tensor, " out"] | None]:
    """Argmin over W', b' of E||y - W' x - b'||^2 + lam ||W' - W||^2: the layer refitted to dense outputs.

    W' = (E[y x^T] + lam W)(E[x x^T] + lam I)^-1, lam = ridge x mean diagonal of E[x x^T]; where the layer has a bias
    the moments are centered and b' = E[y] - W' E[x]. One Cholesky of channel x channel, in float64.

    The driver applies it to the producers (step 1: y = their dense outputs, x = the drifted input), then to the
    consumer (step 2: x = its input recomputed with the new producers), before the module is scored and pruned.
    The error on the calibration tokens never rises.

    Source: arXiv 2407.19126, Algorithms 1, 3 and 4.
    Differs: ridge towards the present weights, biases and centring (not in the paper, which is rank deficient with
    its default 2,048 tokens); the printed (X X^T)^-1 X^T Y reads (X^T X)^-1 X^T Y.

    Raises:
        CalibrationError: the moments cannot be factored even with ten thousand times the ridge.
    """
    n = moments.x.tokens
    second, cross = moments.x.second_moment, moments.cross / n
    if bias is not None:
        mean_x, mean_y = moments.x.mean, moments.y_total / n
        second = moments.x.covariance
        cross = cross - torch.outer(mean_y, mean_x)
    prior = weight.to(second)
    scale = float(second.diagonal().mean())
    if scale == 0:
        return weight, bias
    for factor in (1, 10, 100, 1_000, 10_000):
        lam = (ridge if factor == 1 else max(ridge, 1e-7) * factor) * scale
        damped = second.clone()
        damped.diagonal().add_(lam)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
    else:
        raise CalibrationError(
            f"{n:,} tokens cannot determine {len(second):,} channels. Use at least {4 * len(second):,} tokens or a "
            f"larger --ridge than {ridge:g}."
        )
    refit = torch.cholesky_solve((cross + lam * prior).T, root).T
    if bias is None:
        return refit.to(weight), None
    return refit.to(weight), (mean_y - refit @ mean_x).to(bias)
