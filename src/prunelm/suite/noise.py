"""Part `noise`: whether a pruned model suffers more than the dense one when the text is not clean."""

import math
from typing import Any

from ..data import JOIN, read_documents
from ..evaluation import text_windows, window_bytes
from ..intervals import interval_of_difference
from ..journal import Journal
from ..noising import NOISES
from ..progress import Progress
from ..scoring import Record
from . import Setting, Subject
from .quality import perplexities, scored

Losses = tuple[list[float], list[int]]


def noise(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Quality on the clean text and on each noise at each strength, model and dense paired by window.

    `excess` is the ratio to dense on noisy text over that on clean text, with an interval: above 1, the pruned model
    suffers more than the dense one does. Each text is cut at `max_tokens` tokens of its own, so noisy windows hold
    somewhat less text; bits per byte compare across them, perplexities do not.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite.
    """
    text = JOIN.join(read_documents(subject.text))
    clean, records = _measured(subject, text, setting, journal, progress, "clean")
    rows = []
    for name, (apply, strengths) in NOISES.items():
        for strength in strengths:
            noisy = apply(text, strength, setting.seed)
            row, theirs = _measured(subject, noisy, setting, journal, progress, f"{name} {strength:g}")
            if subject.dense is not None:
                row["excess"] = _excess(row, clean, records, theirs, setting.seed)
            rows.append({"noise": name, "strength": strength, **row})
    return {"clean": clean, "noisy": rows}


def _measured(
    subject: Subject, text: str, setting: Setting, journal: Journal, progress: Progress, stage: str
) -> tuple[dict[str, Any], list[Record]]:
    windows = text_windows(
        text, f"{subject.text}, {stage}", subject.model, subject.tokenizer, setting.length, setting.max_tokens
    )
    records = scored(subject, windows, setting, journal, progress, stage)
    size = sum(window_bytes(window, subject.tokenizer) for window in windows)
    found = perplexities(records, size, setting.seed)
    return {name: value for name, value in found.items() if name != "windows"}, records


def _excess(
    noisy: dict[str, Any], clean: dict[str, Any], before: list[Record], after: list[Record], seed: int
) -> dict[str, float]:
    low, high = interval_of_difference(_differences(after), _differences(before), seed=seed)
    value = noisy["ratio"]["value"] / clean["ratio"]["value"]
    return {"value": value, "low": math.exp(low), "high": math.exp(high)}


def _differences(records: list[Record]) -> Losses:
    return [r["loss"] - r["dense"]["loss"] for r in records], [r["tokens"] for r in records]
