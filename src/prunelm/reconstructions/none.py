"""No reconstruction."""

from jaxtyping import Float, Int
from torch import Tensor

from . import CrossMoments, Layer, reconstruction


@reconstruction("none", stage="none", solves=False)
def none(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    kept: Int[Tensor, " kept"],
    *,
    ridge: float = 0.0,
) -> Layer:
    """The kept columns and the bias as they are."""
    return weight[:, kept], bias
