"""No reconstruction."""

from jaxtyping import Float
from torch import Tensor

from . import CrossMoments, reconstruction


@reconstruction("none")
def none(
    weight: Float[Tensor, "out channel"],
    bias: Float[Tensor, " out"] | None,
    moments: CrossMoments,
    *,
    ridge: float = 0.0,
) -> tuple[Float[Tensor, "out channel"], Float[Tensor, " out"] | None]:
    """The weight and bias as they are."""
    return weight, bias
