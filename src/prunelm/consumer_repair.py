"""The repair of one site's consumer on the stream behind the pruned prefix: what it aims at, and which one is kept."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .distributed import agreed
from .moments import CrossMoments
from .observation import Observed, observe_pair
from .reading import Reading
from .recipe import Recipe
from .reconstructions import Reconstruction
from .rehearsal import copied, put_, widened
from .repairing import Repaired, exchanged_units, repaired
from .sensitivity import Divergence
from .sites import Site, bias_of, weight_of
from .stream import BlockStream

SHARES = (0.0, 0.25, 0.5, 1.0)
"""Dense shares of a repair's target that are tried where held-out tokens choose."""
Targets = list[CrossMoments | None]
"""Moments of the consumer's input with its target, on the tokens to fit and on those held out."""


class ConsumerRepair:
    """Repairs consumers of one run, site by site, before they are narrowed."""

    def __init__(
        self, repair: Reconstruction, stream: BlockStream, dense: BlockStream | None, read: Reading, recipe: Recipe
    ) -> None:
        self.reconstruction, self.stream, self.dense, self.read, self.recipe = repair, stream, dense, read, recipe
        self.divergence = Divergence(stream.fork(), read.priced(recipe)) if recipe.choose_share else None

    @torch.no_grad()
    def __call__(
        self, site: Site, seen: Observed, kept: Int[Tensor, " kept"], *, original: nn.Module | None, fixed: bool
    ) -> tuple[Tensor, Repaired, dict[str, Any]]:
        """The kept units, some perhaps exchanged, their repaired consumer, and what to report.

        Args:
            site: not narrowed yet.
            seen: moments of the consumer's input, on tokens to fit and held out.
            kept: units that the criterion keeps.
            original: the block as it was, once the stream has left the dense one; None while it has not.
            fixed: the units must not be exchanged.
        """
        assert seen.consumer is not None
        recipe = self.recipe
        report: dict[str, Any] = {}
        shares, targets = self._targets(site, seen, original)
        found = self._solved(site, kept, targets(shares[0]))
        if recipe.exchanges and not fixed:
            others, made = exchanged_units(site, seen.consumer, kept, limit=recipe.exchanges, ridge=recipe.ridge)
            others = agreed(others.contiguous())
            other = self._solved(site, others, targets(shares[0]))
            better = other.error < found.error
            report["exchanged"] = made if better else 0
            kept, found = (others, other) if better else (kept, found)
        if len(shares) > 1:
            tried = {shares[0]: found} | {share: self._solved(site, kept, targets(share)) for share in shares[1:]}
            measured = {share: self._divergence(site, kept, layer) for share, layer in tried.items()}
            best = min(shares, key=lambda share: measured[share])
            found = tried[best]
            report |= {"dense_share": best, "divergences": measured}
        errors = {"held_out_errors" if self.read.judging.batches else "errors": found.errors}
        return kept, found, {**report, "repair": found.how, "ridge": found.ridge, **errors}

    def _targets(
        self, site: Site, seen: Observed, original: nn.Module | None
    ) -> tuple[tuple[float, ...], Callable[[float], Targets]]:
        """Dense shares to try, and a function (share) -> targets."""
        layer, exit_ = site.consumer.layer, site.spec.consumer[0]
        weight, bias = weight_of(layer), bias_of(layer)
        moments = ((self.read.fit, seen.consumer), (self.read.held, seen.held))
        if original is None or self.dense is None:
            own = [None if m is None else CrossMoments.of_layer(m, weight, bias) for _, m in moments]
            return (0.0,), lambda _share: own
        at, through = (self.stream, self.dense, site.block), original.get_submodule(exit_)
        pairs = [
            None if m is None else observe_pair(*at, exit_, b, original=original, through=through, advance=False)
            for b, m in moments
        ]
        shares = SHARES if self.divergence is not None else (self.recipe.dense_share,)
        return shares, lambda share: [None if pair is None else pair.blended(weight, bias, share) for pair in pairs]

    def _solved(self, site: Site, kept: Int[Tensor, " kept"], targets: Targets) -> Repaired:
        """The repaired consumer over the columns of some kept units."""
        layer, (fit, held) = site.consumer.layer, targets
        assert fit is not None
        columns, ridge = site.consumer.keep(kept), self.recipe.ridge
        return repaired(self.reconstruction, weight_of(layer), bias_of(layer), fit, held, columns, ridge=ridge)

    def _divergence(self, site: Site, kept: Int[Tensor, " kept"], layer: Repaired) -> float:
        """The divergence of the model with this consumer, the blocks behind it being dense still."""
        assert self.divergence is not None
        consumer, columns = site.consumer.layer, site.consumer.keep(kept)
        old = copied(consumer)
        put_(consumer, widened(layer.weight, columns, old[0]), layer.bias)
        found = self.divergence.measure(site.block, [self.stream.hidden[b] for b in self.divergence.batches])
        put_(consumer, *old)
        return found
