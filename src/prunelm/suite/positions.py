"""Part `positions`: perplexity by position in long windows, where a pruned model may lose the use of far context."""

from typing import Any

from ..data import JOIN, describe, prefix_ids, read_documents, token_ids
from ..evaluation import text_windows
from ..journal import Journal
from ..progress import Progress
from ..scoring import perplexity_by_position
from . import Setting, Subject
from .passages import scored_texts
from .quality import scored

FACTOR = 4


def positions(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Exp of the mean loss where the number of tokens seen doubles, in windows of 4 x `length` tokens.

    Shorter ones where the model reads fewer or the text has fewer, but never shorter than `length`.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite.
    """
    text, length = _long(subject, setting)
    windows = text_windows(text, str(subject.text), subject.model, subject.tokenizer, length, setting.max_tokens)
    records = scored(subject, windows, setting, journal, progress, "positions")
    facts = describe([{"input_ids": w[None]} for w in windows], subject.tokenizer, text=subject.text.name)
    found = {"facts": {**facts, "length": length}, "model": perplexity_by_position(records)}
    if subject.dense is not None:
        found["dense"] = perplexity_by_position([r["dense"] for r in records])
    return found


def positions_read(subject: Subject, setting: Setting) -> list[str]:
    """The text that the part scores."""
    _, length = _long(subject, setting)
    sizes: dict[str, Any] = {"length": length, "max_tokens": setting.max_tokens}
    return scored_texts(subject.model, subject.tokenizer, subject.text, **sizes)


def _long(subject: Subject, setting: Setting) -> tuple[str, int]:
    """The text, and the length of its windows."""
    text = JOIN.join(read_documents(subject.text))
    there = len(token_ids(text, subject.tokenizer)[: setting.max_tokens]) + len(prefix_ids(subject.tokenizer))
    limit = getattr(subject.model.config, "max_position_embeddings", None) or there
    return text, max(setting.length, min(FACTOR * setting.length, limit, there))
