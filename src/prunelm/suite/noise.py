"""Part `noise`: whether a pruned model suffers more than the dense one when the text is not clean."""

from collections.abc import Iterator
from typing import Any

from ..data import JOIN, read_documents
from ..encoders import questions
from ..journal import Journal
from ..noising import NOISES, Noise
from ..progress import Progress
from ..tasks import task_of
from . import Setting, Subject
from .quality import answers
from .texts import beside, score_text


def noise(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Quality on the clean text and on each noise at each strength, model and dense paired by window.

    `added` and `excess` are those of `beside`, noisy text against clean. Each text is cut at `max_tokens` tokens of
    its own, so noisy windows hold somewhat less text; bits per byte compare across them, perplexities do not.
    Classifiers are asked about the same sentences, each with noise of its own: accuracies and their difference.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite.
    """
    if task_of(subject.model) == "classifier":
        return _classified(subject, setting, journal, progress)
    text = JOIN.join(read_documents(subject.text))
    clean = score_text(subject, text, setting, journal, progress, "clean", str(subject.text))
    rows = []
    for name, strength, apply in _kinds():
        noisy, stage = apply(text, strength, setting.seed), f"{name} {strength:g}"
        one = score_text(subject, noisy, setting, journal, progress, stage, f"{subject.text}, {stage}")
        compared = beside(one, clean, list(subject.models), setting.seed)
        rows.append({"noise": name, "strength": strength, **one.found, **compared})
    return {"clean": clean.found, "noisy": rows}


def _kinds() -> Iterator[tuple[str, float, Noise]]:
    return ((name, strength, apply) for name, (apply, strengths) in NOISES.items() for strength in strengths)


def _classified(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    def asked(stage: str, apply: Noise | None = None, strength: float = 0.0) -> dict[str, Any]:
        sizes: dict[str, Any] = {"length": setting.length, "max_tokens": setting.max_tokens, "seed": setting.seed}
        if apply is not None:
            sizes["change"] = lambda text, place: apply(text, strength, setting.seed + place)
        put = questions("classifier", subject.model, subject.tokenizer, subject.text, **sizes)
        found = answers(subject, put, setting, journal, progress, stage, f"{subject.text}, {stage}")
        return {name: value for name, value in found.items() if name != "facts"}

    clean = asked("clean")
    rows = [{"noise": n, "strength": s, **asked(f"{n} {s:g}", apply, s)} for n, s, apply in _kinds()]
    return {"clean": clean, "noisy": rows}
