"""Part `noise`: whether a pruned model suffers more than the dense one when the text is not clean."""

from typing import Any

from ..data import JOIN, read_documents
from ..journal import Journal
from ..noising import NOISES
from ..progress import Progress
from . import Setting, Subject
from .texts import beside, score_text


def noise(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Quality on the clean text and on each noise at each strength, model and dense paired by window.

    `added` and `excess` are those of `beside`, noisy text against clean. Each text is cut at `max_tokens` tokens of
    its own, so noisy windows hold somewhat less text; bits per byte compare across them, perplexities do not.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite.
    """
    text = JOIN.join(read_documents(subject.text))
    clean = score_text(subject, text, setting, journal, progress, "clean", str(subject.text))
    rows = []
    for name, (apply, strengths) in NOISES.items():
        for strength in strengths:
            noisy, stage = apply(text, strength, setting.seed), f"{name} {strength:g}"
            one = score_text(subject, noisy, setting, journal, progress, stage, f"{subject.text}, {stage}")
            compared = beside(one, clean, list(subject.models), setting.seed)
            rows.append({"noise": name, "strength": strength, **one.found, **compared})
    return {"clean": clean.found, "noisy": rows}
