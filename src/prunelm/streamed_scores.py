"""What models bigger than memory make of windows of text: their blocks pass through memory one at a time."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .progress import Progress, silent
from .scoring import Record, records_of
from .shelf import Shelf
from .stream import BlockStream

STATES = 2**30
"""Bytes of hidden states of one model that wait between its blocks, at most; more windows take another pass."""


class StreamedScores:
    """The records of windows that `score_windows` makes, of models whose blocks stay in their files.

    As many windows as there is room for go through the blocks together, each on its own, so that the numbers are those
    of a model in memory.
    """

    def __init__(self, shelf: Shelf, dense: Shelf | None = None, progress: Progress = silent) -> None:
        self._shelves = [shelf] if dense is None else [shelf, dense]
        self._progress = progress
        self._streams: list[BlockStream] = []
        self._group = range(0)

    @torch.no_grad()
    def score(self, windows: Sequence[Int[Tensor, " token"]], i: int) -> list[Record]:
        """The record of window `i`; the first of a group that is asked for has all of the group computed."""
        if i not in self._group:
            self._streams.clear()
            self._group = range(i, min(i + self._room(windows[i]), len(windows)))
            self._streams.extend(self._passed([windows[n] for n in self._group], which) for which in self._shelves)
        mine, *theirs = [self._logits(stream, i - self._group.start) for stream in self._streams]
        return records_of(mine, windows[i][None], theirs[0] if theirs else None)

    def _room(self, window: Int[Tensor, " token"]) -> int:
        """How many windows pass together."""
        widest = max(int(shelf.model.config.hidden_size) * shelf.dtype.itemsize for shelf in self._shelves)
        return max(1, STATES // (len(window) * widest))

    def _passed(self, windows: Sequence[Int[Tensor, " token"]], shelf: Shelf) -> BlockStream:
        """A stream of some windows behind the last block of a model."""
        before, total = len(shelf.blocks) * self._shelves.index(shelf), len(shelf.blocks) * len(self._shelves)
        return shelf.passed(
            [window[None] for window in windows], lambda n: self._progress("blocks read", before + n, total)
        )

    @staticmethod
    def _logits(stream: BlockStream, b: int) -> Float[Tensor, "1 token vocab"]:
        return stream.outputs(b, stream.hidden[b])[None, :-1]
