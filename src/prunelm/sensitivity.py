"""What a site's error costs at the model's output, measured by forward passes on held-out tokens."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from .distributed import summed, summed_number
from .gradients import differentiable, gradient_of
from .losses import answers, predicts
from .plan import Budget
from .rehearsal import Rehearsal
from .sites import Site, bias_of, weight_of
from .stream import Batch, BlockStream, States
from .tasks import task_of

LEVELS = (0.25, 0.6)
"""Shares of a site's units at which its price is measured; sites with few options are measured at all of them."""
STEEP = (0.5, 2.5)
"""Limits of the exponent p in KL = A x error^p."""
Point = tuple[int, float]
"""(units removed, divergence measured)."""
Told = Callable[[int], None]
"""Told how many batches are done."""
Watched = Callable[[int], AbstractContextManager[None]]
"""What is open while a batch passes."""


def _nobody(_done: int) -> None:
    pass


def _unwatched(_b: int) -> AbstractContextManager[None]:
    return nullcontext()


def levels_of(site: Site, budget: Budget) -> list[int]:
    """Numbers of removed units at which a site is priced."""
    options = budget.options(site)[1:]
    if len(options) <= len(LEVELS):
        return options
    wanted = [share * site.n_units for share in LEVELS]
    return sorted({min((abs(o - want), o) for o in options)[1] for want in wanted})


@dataclass(frozen=True, kw_only=True)
class Slope:
    """The gradient of the divergence at a layer: of its weight, and of its bias where it has one."""

    weight: Float[Tensor, "out channel"]
    bias: Float[Tensor, " out"] | None


class Divergence:
    """Mean divergence of a changed model from itself as it was, on the batches of a stream at its first block.

    KL(dense || changed) per token in nats where the model predicts something; else the squared distance of the last
    hidden states, relative to the dense ones. `rows` are the tokens (sequences, for classifiers) that it averages.

    Of several processes, each measures its own batches; `whole` are those of all. With `again`, the dense rows are not
    kept, which many tokens have no room for, but computed again from the last hidden states: from `leaving`, those of
    all the stream's batches behind the last block, where they are known.
    """

    @torch.no_grad()
    def __init__(
        self,
        stream: BlockStream,
        batches: Sequence[int],
        whole: Sequence[Batch] | None = None,
        *,
        again: bool = False,
        leaving: States | None = None,
        told: Told = _nobody,
    ) -> None:
        self.stream, self.batches = stream, list(batches)
        self.entering = [stream.hidden[b] for b in self.batches]
        self.predicts = predicts(stream.model)
        self._last: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        energy, tokens = 0.0, task_of(stream.model) in ("causal", "masked")
        for b in self.batches:
            last = self._through(b, 0, stream.hidden[b]) if leaving is None else leaving[b]
            if again and tokens:
                self._last[b], self.counts[b] = last, stream.count(b)
            else:
                rows = self._rows(stream.outputs(b, last))
                self.counts[b] = len(rows)
                energy += 0.0 if self.predicts else float(rows.square().sum())
                (self._last if again else self._kept)[b] = last if again else rows
            told(len(self.counts))
        self.whole = whole if whole is not None else [stream.batches[b] for b in self.batches]
        self.rows = self.rows_of(self.batches)
        self.energy = 1.0 if self.predicts else summed_number(energy) / self.rows

    def on(self, stream: BlockStream) -> "Divergence":
        """The divergence of another model from the same one, on a stream of the same batches."""
        found = copy.copy(self)
        found.stream = stream
        return found

    def off(self) -> "Divergence":
        """The same on no stream, which keeps no model in memory; it measures once it is `on` one."""
        found = copy.copy(self)
        del found.stream
        return found

    def among(self, batches: Sequence[int]) -> "Divergence":
        """The same divergence on some of the batches."""
        found = copy.copy(self)
        found.batches = list(batches)
        found.entering = [self.entering[self.batches.index(b)] for b in batches]
        found.whole = [self.stream.batches[b] for b in batches]
        found.rows = self.rows_of(batches)
        return found

    @torch.no_grad()
    def dense(self, b: int) -> Float[Tensor, "row _"]:
        """What the dense model answered to batch `b`."""
        return self._kept[b] if b in self._kept else self._rows(self.stream.outputs(b, self._last[b]))

    def _through(self, b: int, i: int, hidden: Tensor) -> Tensor:
        """The hidden states of batch `b` behind the last block, from those that enter block `i`."""
        stream = self.stream
        before = stream.hidden[b]
        for j in range(i, len(stream.blocks)):
            stream.hidden[b] = hidden
            hidden = stream.run(j, b)
        stream.hidden[b] = before
        return hidden

    def _rows(self, output: Tensor) -> Tensor:
        return output.float().log_softmax(-1) if self.predicts else output.float()

    @torch.no_grad()
    def measure(self, i: int, hidden: Sequence[Tensor]) -> float:
        """The divergence now, from the hidden states of each batch that enter block `i`."""
        total = 0.0
        for b, entering in zip(self.batches, hidden, strict=True):
            now = self._rows(self.stream.outputs(b, self._through(b, i, entering)))
            total += float(self._summed(now, self.dense(b)))
        return summed_number(total) / self.rows

    def slopes(
        self, sites: Sequence[Site], batches: Sequence[int] | None = None, watched: Watched = _unwatched
    ) -> dict[str, Slope]:
        """The gradient of the divergence now, by site key, with respect to the site's consumer.

        Of some of the batches, where they are named; `watched` is open while one of them passes forward and backward.
        """
        layers = {site.key: site.consumer.layer for site in sites}
        batches = self.batches if batches is None else batches
        biases = {key: bias for key, layer in layers.items() if (bias := bias_of(layer)) is not None}
        found = {k: torch.zeros_like(weight_of(layer), dtype=torch.float32) for k, layer in layers.items()}
        shifts = {k: torch.zeros_like(bias, dtype=torch.float32) for k, bias in biases.items()}
        with differentiable(self.stream.model, layers.values(), biases.values()):
            for b in batches:
                with watched(b):
                    torch.autograd.backward(self.of_batch(b))
                for key, layer in layers.items():
                    gradient = gradient_of(layer)
                    if gradient is not None:
                        found[key] += gradient
                    layer.weight.grad = None
                for key, bias in biases.items():
                    if bias.grad is not None:
                        shifts[key] += bias.grad
                    bias.grad = None
        rows = self.rows_of(batches)
        whole = {key: summed(slope) / rows for key, slope in found.items()}
        return {k: Slope(weight=w, bias=summed(shifts[k]) / rows if k in shifts else None) for k, w in whole.items()}

    def rows_of(self, batches: Sequence[int]) -> int:
        """How many rows some batches have, those of other processes included."""
        return int(summed_number(sum(self.counts[b] for b in batches)))

    def of_batch(self, b: int) -> Float[Tensor, ""]:
        """The divergence of batch `b` now, summed over its rows, to be differentiated."""
        return self._summed(answers(self.stream.model, self.stream.batches[b]), self.dense(b))

    def _summed(self, now: Tensor, dense: Tensor) -> Tensor:
        """The divergence of some rows, summed."""
        if self.predicts:
            return kl_div(now, dense, log_target=True, reduction="sum")
        return (now - dense).square().sum() / self.energy


def rehearsed(removed: Mapping[str, int], rehearsal: Rehearsal, divergence: Divergence) -> float:
    """The divergence of the model once a rehearsal has removed this many units of each site."""
    rehearsal.apply(removed)
    return divergence.measure(0, divergence.entering)


def damage_of(
    curve: Float[Tensor, " count"], points: Sequence[Point], options: Sequence[int]
) -> Float[Tensor, " option"]:
    """The divergence to expect with each number of removed units: a power of the error, through the measured points.

    Between points KL = A x error^p, p from both; outside, p of the nearest pair, within [0.5, 2.5]. Never falls.

    Args:
        curve: relative error with 0, 1, 2... units removed.
        points: (units removed, divergence measured), ascending.
        options: numbers of units that may be removed, ascending; 0 is not among them where some must go.
    """
    known = [(math.log(max(float(curve[o]), 1e-12)), math.log(max(kl, 1e-9))) for o, kl in points]
    slopes = [min(max((y1 - y0) / max(x1 - x0, 1e-9), STEEP[0]), STEEP[1]) for (x0, y0), (x1, y1) in pairwise(known)]
    slopes = slopes or [1.0]
    found = list[float]()
    for o in options:
        if o == 0 or len(options) == 1:
            found.append(0.0)
            continue
        x = math.log(max(float(curve[o]), 1e-12))
        nearest = min(range(len(known)), key=lambda k: abs(known[k][0] - x))
        slope = slopes[min(nearest, len(slopes) - 1) if x >= known[nearest][0] else max(nearest - 1, 0)]
        found.append(math.exp(known[nearest][1] + slope * (x - known[nearest][0])))
    return torch.tensor(found, dtype=torch.float64).cummax(0).values
