"""FLAP: a channel that hardly varies can be folded into the bias."""

from jaxtyping import Float
from torch import Tensor

from ..placement import exact
from ..sites import Site, weight_of
from . import Statistics, criterion


@criterion("flap", needs={"consumer"})
def flap(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Output variance lost with each unit: sum over its channels j of Var[x_j] ||W_j||^2 (WIFV).

    Exact for the removal of one channel when its mean goes into the bias and channels are uncorrelated.

    Source: arXiv 2312.11983, the "WIFV" metric.
    Differs: a head's score is the sum over its channels (the code takes the mean, the same up to a constant); the
    variance is exact, where the code's running form uses the new mean twice and squares the attention metric.
    """
    assert statistics.consumer is not None
    moments = statistics.consumer
    variance = (moments.energy - moments.mean.square()).clamp_min(0)
    columns = exact(weight_of(site.consumer.layer)).square().sum(0)
    return (columns * variance)[site.consumer.index].sum(1)
