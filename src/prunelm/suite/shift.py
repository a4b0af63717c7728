"""Part `shift`: whether a pruned model loses more than the dense one on text of another kind."""

from pathlib import Path
from typing import Any

from ..data import JOIN, read_documents
from ..journal import Journal
from ..progress import Progress
from . import Setting, Subject
from .passages import calibration_overlap, scored_texts
from .texts import beside, score_text


def shift(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Quality on the text and on each other text, model and dense paired by window, and what the change adds.

    `added` and `excess` are those of `beside`; `overlap` says how much of each text the model was calibrated on.

    Raises:
        DataError: a text does not fill one window.
        EvaluationError: losses are not finite.
    """
    text = JOIN.join(read_documents(subject.text))
    home = score_text(subject, text, setting, journal, progress, subject.text.name, str(subject.text))
    rows = []
    for place in map(Path, setting.others):
        words = JOIN.join(read_documents(place))
        one = score_text(subject, words, setting, journal, progress, place.name, str(place))
        compared = beside(one, home, list(subject.models), setting.seed)
        sizes: dict[str, Any] = {"length": setting.length, "max_tokens": setting.max_tokens}
        met = calibration_overlap(subject.source, scored_texts(subject.model, subject.tokenizer, place, **sizes))
        rows.append({"text": place.name, **one.found, **compared, "overlap": met})
    return {"home": {"text": subject.text.name, **home.found}, "others": rows}
