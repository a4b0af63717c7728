"""Which hidden channels matter: one ranking for the whole model, because a channel goes everywhere at once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .hidden import HiddenAxis, Readers
from .moments import Moments
from .placement import exact, statistics_device
from .progress import Progress
from .sites import weight_of
from .stream import BlockStream

CRITERIA = ("energy", "magnitude")
"""Criteria for hidden channels: `energy` reads activations, `magnitude` weights alone."""


def reader_magnitude(axis: HiddenAxis) -> Float[Tensor, " channel"]:
    """Share of each channel in its readers' weights: mean over readers of ||W[:, c]||^2 / ||W||^2.

    Source: the l2 criterion of arXiv 2407.13331, for the hidden dimension; the mean over readers is derived.
    """
    shares = []
    for readers in axis.readers:
        for layer in readers.layers:
            squares = exact(weight_of(layer).detach()).square().sum(0)
            shares.append(squares / squares.sum().clamp_min(torch.finfo(torch.float64).tiny))
    return torch.stack(shares).mean(0).cpu()


@torch.no_grad()
def reader_energy(
    stream: BlockStream, axis: HiddenAxis, batches: Sequence[int], progress: Progress
) -> Float[Tensor, " channel"]:
    """Share of each channel in what its readers put out: mean over readers of ||W[:, c]||^2 E[x_c^2] / E||W x||^2.

    It is what a reader's output loses where nothing repairs it and channels are uncorrelated, relative to the whole.

    Source: derived; for one reader it is GOA's second moment (arXiv 2407.19126, eq. 3) of its input channels.

    Args:
        stream: at the first block of the dense model; it is used up.
        axis: of that model.
        batches: which of the stream's batches are read.
        progress: told about every block.

    Raises:
        CalibrationError: statistics are not finite; names the layer.
    """
    shares: list[Tensor] = []
    blocks = len(stream.blocks)
    for i in range(blocks):
        progress("hidden channels", i, blocks)
        for readers in (r for r in axis.readers if r.block == i):
            moments = _input_moments(stream, readers, axis.width, batches)
            shares += [_shares(layer, moments) for layer in readers.layers]
        stream.advance(i)
    outside = [r for r in axis.readers if r.block is None]
    for readers, moments in zip(outside, _moments_outside(stream, outside, axis.width, batches), strict=True):
        shares += [_shares(layer, moments) for layer in readers.layers]
    progress("hidden channels", blocks, blocks)
    return torch.stack(shares).mean(0).cpu()


def _shares(layer: nn.Module, moments: Moments) -> Float[Tensor, " channel"]:
    weight = exact(weight_of(layer).detach())
    whole = (weight @ moments.second_moment * weight).sum()
    return weight.square().sum(0) * moments.energy / whole.clamp_min(torch.finfo(torch.float64).tiny)


def _input_moments(stream: BlockStream, readers: Readers, width: int, batches: Sequence[int]) -> Moments:
    assert readers.block is not None
    moments = Moments(width, device=statistics_device(stream.model.device))
    for b in batches:
        (x,) = stream.capture(readers.block, b, [readers.paths[0]])
        moments.update(x)
    moments.check(f"block {readers.block}, {readers.paths[0]}")
    return moments


def _moments_outside(
    stream: BlockStream, outside: Sequence[Readers], width: int, batches: Sequence[int]
) -> list[Moments]:
    place = statistics_device(stream.model.device)
    found = [Moments(width, device=place) for _ in outside]
    paths = [readers.paths[0] for readers in outside]
    for b in batches if outside else ():
        for moments, x in zip(found, stream.capture_outside(b, paths), strict=True):
            moments.update(x)
    for path, moments in zip(paths, found, strict=True):
        moments.check(path)
    return found
