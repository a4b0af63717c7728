"""FLAP's repair: what the removed units gave on average goes into the bias."""

from jaxtyping import Float, Int
from torch import Tensor

from . import CrossMoments, Layer, reconstruction


@reconstruction("bias", guards=("none",), solves=False, only_biases=True)
def bias_only(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    kept: Int[Tensor, " kept"],
    *,
    ridge: float = 0.0,
) -> Layer:
    """The kept columns as they are, and the bias that makes the mean error zero: b' = E[y] - W_kept E[x_kept].

    Where the targets are the layer's own outputs that is b + W_removed E[x_removed]. A layer without a bias is left
    alone.

    Source: arXiv 2312.11983, its bias compensation.
    Differs: added to the bias that is there; FLAP's code overwrites it.
    """
    if bias is None:
        return weight[:, kept], None
    mean_y, mean_x = moments.y_total / moments.x.tokens, moments.x.mean
    return weight[:, kept], (mean_y - weight[:, kept].to(mean_x) @ mean_x[kept]).to(bias)
