"""Wanda-sp: Wanda's |W| x ||a|| summed over the structure."""

from jaxtyping import Float
from torch import Tensor

from ..placement import exact
from ..sites import Site, weight_of
from . import Statistics, criterion


@criterion("wanda-sp", needs={"consumer"})
def wanda_sp(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Weight times activation: sum over the unit's channels c of mean_o |W2[o, c]| x E[a_c^2]^(1/2).

    Source: the structured form of Wanda (arXiv 2306.11695) used as a baseline by FLAP (arXiv 2312.11983).
    """
    assert statistics.consumer is not None
    norm = statistics.consumer.energy.sqrt()
    per_channel = exact(weight_of(site.consumer.layer)).abs().mean(0) * norm
    return per_channel[site.consumer.index].sum(1)
