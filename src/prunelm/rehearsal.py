"""A model as a plan would leave it, without narrowing anything, so that plans can be judged and taken back."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .moments import CrossMoments, Moments
from .plan import top_units
from .reconstructions import Reconstruction
from .sites import Site, bias_of, weight_of

Layer = tuple[Float[Tensor, "out channel"], Float[Tensor, " out"] | None]


class Rehearsal:
    """While open, consumers act as if units were gone and the others repaired; closed, they are as they were.

    Columns of removed units are zero, which computes what narrowing computes. Repairs are solved from the moments of
    the dense model, so no plan needs a pass over the calibration text. Solved layers are kept until `forget`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Float[Tensor, " unit"]],
        moments: Mapping[str, Moments],
        repair: Reconstruction,
        ridge: float,
    ) -> None:
        self.sites = {site.key: site for site in sites}
        self.scores, self.moments, self.repair, self.ridge = scores, moments, repair, ridge
        self.now = dict.fromkeys(self.sites, 0)
        self._solved: dict[tuple[str, int], Layer] = {}

    @torch.no_grad()
    def __enter__(self) -> "Rehearsal":
        for key, site in self.sites.items():
            self._solved[key, 0] = copied(site.consumer.layer)
        return self

    def __exit__(self, *_: object) -> None:
        self.apply(dict.fromkeys(self.sites, 0))
        self._solved.clear()

    @torch.no_grad()
    def layer(self, key: str, removed: int) -> Layer:
        """A consumer's weight over all its channels, and its bias, with that many units of its site removed."""
        if (key, removed) not in self._solved:
            site, (weight, bias) = self.sites[key], self._solved[key, 0]
            columns = site.consumer.keep(top_units(self.scores[key], site.n_units - removed, site.strata))
            moments = CrossMoments.of_layer(self.moments[key], weight, bias)
            narrow, new_bias = self.repair(weight, bias, moments, columns, ridge=self.ridge)
            self._solved[key, removed] = widened(narrow, columns, weight), new_bias
        return self._solved[key, removed]

    @torch.no_grad()
    def apply(self, removed: Mapping[str, int]) -> None:
        """Remove this many units of each site, and put back what else was removed of it."""
        for key, count in removed.items():
            if self.now[key] == count:
                continue
            put_(self.sites[key].consumer.layer, *self.layer(key, count))
            self.now[key] = count

    def forget(self) -> None:
        """Drop all solved layers but those in use and the dense ones."""
        self._solved = {(key, n): layer for (key, n), layer in self._solved.items() if n in (0, self.now[key])}


def copied(layer: nn.Module) -> Layer:
    """A copy of a layer's weight and bias."""
    weight, bias = weight_of(layer), bias_of(layer)
    return weight.detach().clone(), None if bias is None else bias.detach().clone()


def widened(
    narrow: Float[Tensor, "out kept"], columns: Int[Tensor, " kept"], like: Float[Tensor, "out channel"]
) -> Float[Tensor, "out channel"]:
    """A weight over all channels that computes what `narrow` computes from the kept ones: zero in all other columns."""
    whole = torch.zeros_like(like)
    whole[:, columns] = narrow.to(whole)
    return whole


@torch.no_grad()
def put_(layer: nn.Module, weight: Float[Tensor, "out channel"], bias: Float[Tensor, " out"] | None) -> None:
    """Copy a weight, and a bias where the layer has one and one is given, into a layer."""
    weight_of(layer).copy_(weight)
    own = bias_of(layer)
    if own is not None and bias is not None:
        own.copy_(bias)
