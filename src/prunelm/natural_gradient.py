"""Steps of natural gradient: what stays moves at once, down the divergence of the model's output from the dense one.

A repair fits each site to what its own dense weights would give, and does not see what the model's output makes of the
errors that are left. Their gradient does. With R the gradient of the divergence with respect to a consumer's weight W,
C the second moment of its input and G that of its output's gradient, over tokens, the consumers of all sites move by

    W <- W - t (G + g I)^-1 R (C + c I)^-1,     g, c = mean diagonals of G and C

where t is one number for all, found by measuring on held-out tokens: the curvature that errors of different sites have
together is in none of the matrices. Lengths are compared on the first of the held-out tokens, and the best is judged on
all. The steps share the tokens to fit, each follows the gradient on its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .distributed import agreed_number
from .fisher import finite
from .moments import Moments
from .placement import exact, statistics_device
from .progress import Progress, silent
from .reading import Reading
from .rehearsal import copied, put_
from .sensitivity import Divergence, Told
from .sites import Site, find_sites, weight_of
from .stream import BlockStream, States
from .tasks import task_of
from .workbench import Step, Workbench

FIRST = 1 / 4
"""The first length tried, as a share of that which would bring the divergence to zero if it went on falling as now."""
TRIED = 1 / 4
"""Share of the held-out tokens that lengths are compared on."""
HALVINGS = 6
"""How often a length that does not help is halved before the weights stay as they are."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What the dense model answers: on the tokens whose gradient is followed, and on held-out ones that judge it.

    `few` and `rest` are the held-out ones; `rest` has no rows where that is one batch. `parts` are the batches to fit
    of each step; of the steps asked for, only those that there is text for.
    """

    fit: Divergence
    few: Divergence
    rest: Divergence
    parts: list[list[int]]
    asked: int

    def on(self, stream: BlockStream) -> "Aim":
        """The same aim for another model of the dense one, on a stream of the same batches."""
        return replace(self, fit=self.fit.on(stream), few=self.few.on(stream), rest=self.rest.on(stream))

    def off(self) -> "Aim":
        """The same aim, which does not keep the dense model in memory; steps are taken once it is `on` a stream."""
        return replace(self, fit=self.fit.off(), few=self.few.off(), rest=self.rest.off())

    @property
    def rows(self) -> int:
        """How many tokens, or sequences of a classifier, are held out."""
        return self.few.rows + self.rest.rows

    def judged(self, few: float | None = None) -> tuple[float, float]:
        """The divergence on the first of the held-out tokens, unless it is known, and on all."""
        few = _now(self.few) if few is None else few
        rest = _now(self.rest) if self.rest.rows else 0.0
        return few, (self.few.rows * few + self.rest.rows * rest) / self.rows


def _now(divergence: Divergence) -> float:
    return divergence.measure(0, divergence.entering)


def aim_of(
    stream: BlockStream, read: Reading, steps: int, leaving: States | None = None, progress: Progress = silent
) -> Aim:
    """The aim of some steps.

    Args:
        stream: at the first block of the dense model.
        read: which batches are for what.
        steps: of natural gradient.
        leaving: the hidden states of all batches behind the last block, where they are known.
        progress: told about every batch.

    Raises:
        DataError: nothing was held out.
    """
    read.check_held("steps of natural gradient are judged by")
    told = partial(_tell, progress, "dense answers", len(read.fit) + len(read.held))
    fit = Divergence(stream, read.fit, again=True, leaving=leaving, told=partial(told, 0))
    held = Divergence(stream, read.held, again=True, leaving=leaving, told=partial(told, len(read.fit)))
    first = read.first_held(TRIED)
    few, rest = held.among(first), held.among([b for b in held.batches if b not in first])
    return Aim(fit=fit, few=few, rest=rest, parts=read.fit_parts(steps), asked=steps)


@torch.no_grad()
def natural_steps_(
    model: PreTrainedModel,
    aim: Aim,
    *,
    bench: Workbench | None = None,
    progress: Progress = silent,
) -> list[str]:
    """Move the consumers of all sites by some steps, in place, and say what came of it.

    Each of n steps costs about three forward passes over an n-th of the tokens to fit, one or two over those held out,
    more where none is taken. A step that does not lower the divergence on those is not taken.

    Args:
        model: pruned, in eval mode; the aim was taken when it was dense.
        aim: see there.
        bench: where steps are kept, and read from when they were made before.
        progress: told about every batch.

    Raises:
        CalibrationError: a gradient is not finite; names the site.

    Source: ours; Kronecker factors as in arXiv 1503.05671 (K-FAC), there of the Fisher matrix and for training.
    """
    bench = bench or Workbench()
    sites = [site for site in find_sites(model) if weight_of(site.consumer.layer).numel()]
    now = aim.judged()
    start = now[1]
    told = partial(_tell, progress, "natural gradient", len(aim.fit.batches))
    taken = done = 0
    for n, batches in enumerate(aim.parts):
        step = bench.get(f"natural-step-{n}")
        if step is None:
            step = _stepped_(sites, aim, batches, now, partial(told, done))
            bench.put(f"natural-step-{n}", step)
        _put_(sites, step.tensors)
        now, taken = tuple(step.facts["divergence"]), taken + bool(step.tensors)
        done += len(batches)
    what = f"{aim.rows:,} held-out {'sequences' if task_of(model) == 'classifier' else 'tokens'}"
    steps = f"{taken} of {len(aim.parts)} steps" if taken else ""
    few = f", the text having no more sequences to fit than {len(aim.parts)}" if len(aim.parts) < aim.asked else ""
    return [_said(start, now[1], steps, what) + few]


def _tell(progress: Progress, stage: str, total: int, before: int, done: int) -> None:
    progress(stage, before + done, total)


def _said(start: float, now: float, taken: str, what: str) -> str:
    if not taken:
        return f"natural gradient: no step lowers the divergence, {start:.4g}, on {what}; weights stay"
    return f"natural gradient: divergence {start:.4g} -> {now:.4g} on {what} in {taken}"


def _stepped_(sites: Sequence[Site], aim: Aim, batches: Sequence[int], now: tuple[float, float], told: Told) -> Step:
    """One step where it helps: the new weights by site key, still to be put; none where it does not.

    `now`, and the fact `divergence` after the step: as `Aim.judged` has it.
    """
    if not aim.fit.rows_of(batches):
        return Step(facts={"divergence": now})
    seen, directions, falls = _seen(sites, aim.fit, batches, told), dict[str, Tensor](), 0.0
    for key in list(seen):
        one = seen.pop(key)  # matrices of all sites are large: each goes once its direction is known
        directions[key] = direction(one.slope, one.inputs.second_moment, one.gradients.second_moment).float()
        falls += float((directions[key] * one.slope.to(directions[key])).sum())
    falls = agreed_number(falls)
    if falls <= 0:
        return Step(facts={"divergence": now})
    before = {site.key: copied(site.consumer.layer)[0] for site in sites}

    def moved(length: float) -> dict[str, Tensor]:
        return {key: before[key].float() - length * d.to(before[key].device) for key, d in directions.items()}

    def tried(length: float) -> float:
        _put_(sites, moved(length))
        return _now(aim.few)

    length, few = _best_length(tried, FIRST * now[1] / falls, now[0])
    if length:
        weights = moved(length)
        _put_(sites, weights)
        after = aim.judged(few)
        if after[1] < now[1]:
            return Step(facts={"divergence": after, "length": length}, tensors=weights)
    _put_(sites, before)
    return Step(facts={"divergence": now})


def _best_length(tried: Callable[[float], float], first: float, now: float) -> tuple[float, float]:
    """The best of some lengths and its divergence: doubled while that helps, or halved until one does; else 0."""
    best, length = (0.0, now), first
    found = tried(length)
    if found < now:
        while found < best[1]:
            best = (length, found)
            length *= 2
            found = tried(length)
        return best
    for _ in range(HALVINGS):
        length /= 2
        found = tried(length)
        if found < best[1]:
            best = (length, found)
        elif best[0]:
            break
    return best


def direction(
    slope: Float[Tensor, "out channel"], inputs: Float[Tensor, "channel channel"], gradients: Float[Tensor, "out out"]
) -> Float[Tensor, "out channel"]:
    """(G + g I)^-1 R (C + c I)^-1, with g and c the mean diagonals; zero where one of them is."""
    if not (inputs.any() and gradients.any()):
        return torch.zeros_like(exact(slope))
    slope = exact(slope)
    right, left = (torch.linalg.cholesky(_damped(matrix)) for matrix in (inputs, gradients))
    return torch.cholesky_solve(torch.cholesky_solve(slope, left).T, right).T


def _damped(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    return matrix + matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)


@dataclass(frozen=True)
class _Seen:
    """Of one consumer: R, and the moments of its input and of the gradient of its output."""

    slope: Float[Tensor, "out channel"]
    inputs: Moments
    gradients: Moments


def _seen(sites: Sequence[Site], fit: Divergence, batches: Sequence[int], told: Told) -> dict[str, _Seen]:
    """What some batches show of every consumer, by site key, each in one pass forward and backward."""
    layers = {site.key: site.consumer.layer for site in sites}
    moments = {key: _nothing(layer, fit.stream.room.sums) for key, layer in layers.items()}

    @contextmanager
    def watched(b: int) -> Iterator[None]:
        handles = [layer.register_forward_hook(_watch(*moments[key], fit.stream, b)) for key, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        told(batches.index(b) + 1)

    slopes = fit.slopes(sites, batches, watched)
    for key, both in moments.items():
        finite(key, slopes[key].weight)
        for one in both:
            one.settle()
            one.share()
            one.check(key)
    return {key: _Seen(slopes[key].weight, *moments[key]) for key in layers}


def _nothing(layer: nn.Module, dtype: torch.dtype) -> tuple[Moments, Moments]:
    """Empty moments of a layer's input, and of the gradient of its output."""
    out, channels = weight_of(layer).shape
    place = statistics_device(weight_of(layer).device)
    return Moments(channels, device=place, dtype=dtype), Moments(out, device=place, dtype=dtype)


def _watch(inputs: Moments, gradients: Moments, stream: BlockStream, b: int) -> Any:
    """A hook on a layer that adds up the moments of its input and of its output's gradient in batch `b`."""

    def on_forward(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs.update(stream.tokens(args[0].detach(), b))
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradients.update(stream.tokens(gradient.detach(), b))
        )

    return on_forward


def _put_(sites: Sequence[Site], weights: Mapping[str, Tensor]) -> None:
    for site in sites:
        if site.key in weights:
            put_(site.consumer.layer, weights[site.key], None)
