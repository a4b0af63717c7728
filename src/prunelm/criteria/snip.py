"""SNIP: how strongly the loss answers to a gate on the unit."""

from jaxtyping import Float
from torch import Tensor

from ..sites import Site
from . import Statistics, criterion


@criterion("snip", needs={"gates"})
def snip(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """|E[dL/dm]| of a gate m = 1 on the unit's channels before the consumer, over the site's sum.

    Source: arXiv 1810.02340 (connection sensitivity), with one gate a unit in place of one a weight; named among the
    criteria that LIAR (arXiv 2407.13331) repairs.
    """
    assert statistics.gates is not None
    slope = statistics.gates.mean(0).abs()
    return slope / slope.sum().clamp_min(1e-300)
