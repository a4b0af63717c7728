"""What each stage of a pruning costs, in plain forward passes over the calibration text.

Processor seconds of one process, so that what else the machine does matters little.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from prunelm.data import Batches

FIRST = "derivatives"
"""What precedes the first stage that progress names."""
SEARCHING = "searching"


@dataclass
class Stages:
    """A progress that takes the processor seconds of each stage; call `end` behind the last one."""

    seconds: dict[str, float] = field(default_factory=dict)
    _now: str = FIRST
    _since: float = field(default_factory=time.process_time)

    def __call__(self, stage: str, _done: int, _total: int) -> None:
        """As progress is called; what a stage says of itself in parentheses does not make it another."""
        stage = stage.partition(" (")[0]
        if stage != self._now:
            self.end()
            self._now = stage

    def end(self) -> None:
        """Add what has been spent since the present stage began."""
        now = time.process_time()
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + now - self._since
        self._since = now


@torch.no_grad()
def plain_pass(model: PreTrainedModel, calibration: Batches, clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of one forward pass over the calibration text, as a user would run it; of the processor by default."""
    start = clock()
    for batch in calibration.batches:
        model(**batch)
    return clock() - start


def in_passes(seconds: dict[str, float], one: float) -> tuple[float, float]:
    """What everything but the search costs, and the search, in plain passes."""
    search = seconds.get(SEARCHING, 0.0)
    return (sum(seconds.values()) - search) / one, search / one
