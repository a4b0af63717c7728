"""One text beside another: whether a pruned model loses more than the dense one when the text changes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation import text_windows, window_bytes
from ..intervals import exponents, interval_of_difference
from ..journal import Journal
from ..progress import Progress
from ..scoring import Record
from . import Setting, Subject
from .quality import perplexities, scored


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was measured on one text: its summary, its windows' records, and the bytes of text that each predicts."""

    found: dict[str, Any]
    records: list[Record]
    sizes: list[int]

    def of(self, name: str) -> list[Record]:
        """The records of `dense` or of `model`."""
        return self.records if name == "model" else [record["dense"] for record in self.records]


def score_text(
    subject: Subject, text: str, setting: Setting, journal: Journal, progress: Progress, stage: str, where: str
) -> Scored:
    """Both models on a text, cut at `max_tokens` tokens of its own.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite.
    """
    windows = text_windows(text, where, subject.model, subject.tokenizer, setting.length, setting.max_tokens)
    records = scored(subject, windows, setting, journal, progress, stage, where)
    sizes = [window_bytes(window, subject.tokenizer) for window in windows]
    found = perplexities(records, sum(sizes), setting.seed)
    return Scored(
        found={name: value for name, value in found.items() if name != "windows"}, records=records, sizes=sizes
    )


def beside(there: Scored, home: Scored, models: Sequence[str], seed: int) -> dict[str, Any]:
    """What changing from one text to another adds, with intervals; the windows of the two are drawn apart.

    `added`: bits per byte, for each model by itself. `excess`: the ratio to dense there over that at home; above 1,
    the pruned model suffers more than the dense one does.
    """
    added = {name: _added(there, home, name, seed) for name in models}
    if "dense" not in models:
        return {"added": added}
    low, high = exponents(interval_of_difference(_differences(there), _differences(home), seed=seed))
    value = there.found["ratio"]["value"] / home.found["ratio"]["value"]
    return {"added": added, "excess": {"value": value, "low": low, "high": high}}


def _added(there: Scored, home: Scored, name: str, seed: int) -> dict[str, float | None]:
    (mine, sizes), (before, old) = _bits(there, name), _bits(home, name)
    low, high = interval_of_difference((mine, sizes), (before, old), seed=seed)
    return {"value": _mean(mine, sizes) - _mean(before, old), "low": low, "high": high}


def _bits(one: Scored, name: str) -> tuple[list[float], list[int]]:
    """Bits per byte of every window, and its bytes."""
    pairs = zip(one.of(name), one.sizes, strict=True)
    return [record["loss"] * record["tokens"] / math.log(2) / size for record, size in pairs], one.sizes


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _differences(one: Scored) -> tuple[list[float], list[int]]:
    return [r["loss"] - r["dense"]["loss"] for r in one.records], [r["tokens"] for r in one.records]
