"""FLAP: a channel that hardly varies can be folded into the bias."""

from jaxtyping import Float
from torch import Tensor

from ..placement import exact
from ..sites import Site, weight_of
from . import Statistics, criterion


@criterion("flap", needs={"consumer"}, standard=True)
def flap(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Output variance lost with each unit: mean over its channels j of m_j / std(m), m_j = Var[x_j] ||W_j||^2 (WIFV).

    m_j is exact for the removal of one channel when its mean goes into the bias and channels are uncorrelated. The
    standard deviation is over the site's channels: a head's mean varies less than its channels do, so that where
    heads and channels are ranked together (`global`), heads stay near the middle.

    Source: arXiv 2312.11983, the "WIFV" metric, standardised before the mean over a head as in the released code.
    Differs: the variance is exact, where the code's running form uses the new mean twice and squares the attention
    metric.
    """
    assert statistics.consumer is not None
    moments = statistics.consumer
    variance = (moments.energy - moments.mean.square()).clamp_min(0)
    metric = exact(weight_of(site.consumer.layer)).square().sum(0) * variance
    spread = metric.std(correction=0)
    return (metric / (spread if spread > 0 else 1))[site.consumer.index].mean(1)
