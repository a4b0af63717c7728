"""A model as a plan would leave it, without narrowing anything, so that plans can be judged and taken back."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .moments import CrossMoments, Moments
from .plan import order_of, top_units
from .reconstructions import Reconstruction
from .sites import Site, bias_of, weight_of

Layer = tuple[Float[Tensor, "out channel"], Float[Tensor, " out"] | None]


class Rehearsal:
    """While open, consumers act as if units were gone and the others repaired; closed, they are as they were.

    Columns of removed units are zero, which computes what narrowing computes. Repairs are solved from the moments of
    the dense model, so no plan needs a pass over the calibration text. Solved layers are kept until `forget`; where the
    repair can, each site is factored once, for all numbers of its units.
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
        self._nested: dict[str, tuple[Int[Tensor, " channel"], Callable[[int], Layer]]] = {}

    @torch.no_grad()
    def __enter__(self) -> "Rehearsal":
        for key, site in self.sites.items():
            self._solved[key, 0] = copied(site.consumer.layer)
        return self

    def __exit__(self, *_: object) -> None:
        self.apply(dict.fromkeys(self.sites, 0))
        self._solved.clear()
        self._nested.clear()

    @torch.no_grad()
    def layer(self, key: str, removed: int) -> Layer:
        """A consumer's weight over all its channels, and its bias, with that many units of its site removed."""
        if (key, removed) not in self._solved:
            solve = self._leading if self.repair.nested is not None else self._alone
            narrow, new_bias, columns = solve(self.sites[key], self.sites[key].n_units - removed)
            self._solved[key, removed] = widened(narrow, columns, self._solved[key, 0][0]), new_bias
        return self._solved[key, removed]

    def _alone(self, site: Site, kept: int) -> tuple[*Layer, Int[Tensor, " kept"]]:
        """The repaired layer over the kept columns, and these, solved for this number of kept units."""
        columns = site.consumer.keep(top_units(self.scores[site.key], kept, site.strata))
        return *self.repair(*self._own(site), columns, ridge=self.ridge), columns

    def _leading(self, site: Site, kept: int) -> tuple[*Layer, Int[Tensor, " kept"]]:
        """The same, from a factorization that serves every number of kept units."""
        if site.key not in self._nested:
            assert self.repair.nested is not None
            order = site.consumer.order(order_of(self.scores[site.key], site.strata))
            self._nested[site.key] = order, self.repair.nested(*self._own(site), order, ridge=self.ridge)
        order, first = self._nested[site.key]
        columns = len(site.consumer.fixed) + kept * site.consumer.index.shape[1]
        return *first(columns), order[:columns]

    def _own(self, site: Site) -> tuple[*Layer, CrossMoments]:
        """A consumer's own weight and bias, and the moments of its input with its own output."""
        weight, bias = self._solved[site.key, 0]
        return weight, bias, CrossMoments.of_layer(self.moments[site.key], weight, bias)

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
