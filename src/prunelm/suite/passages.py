"""Whether what a model is scored on was in its calibration, by what its pruning.json keeps of that text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import JOIN, prefix_ids, read_documents, token_ids
from ..encoders import labeled_texts
from ..loading import Source
from ..overlap import overlap
from ..tasks import task_of
from . import Setting, Subject


def calibration_overlap(source: Source, texts: Sequence[str]) -> dict[str, Any] | None:
    """How much of some texts the model was calibrated on, by its pruning.json; None without such a file."""
    plan = source.plan()
    if plan is None:
        return None
    calibration = plan["calibration"]["criterion"]
    if "ngrams" not in calibration:
        return {"unknown": f"pruning.json has no n-grams of its calibration text ({calibration.get('source')})"}
    return overlap(texts, calibration["ngrams"])


def scored_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Path, *, length: int, max_tokens: int | None
) -> list[str]:
    """What is scored of a file, and nothing else of it: its windows as one text, or every text of an encoder, cut.

    Raises:
        DataError: the file cannot be read.
    """
    if task_of(model) == "causal":
        body = length - len(prefix_ids(tokenizer))
        ids = token_ids(JOIN.join(read_documents(text)), tokenizer)[:max_tokens]
        return [str(tokenizer.decode(ids[: len(ids) // body * body]))]
    texts, _ = labeled_texts(task_of(model), text, tokenizer, max_tokens)
    return [str(tokenizer.decode(token_ids(one, tokenizer)[:length])) for one in texts]


def windows_read(subject: Subject, setting: Setting) -> list[str]:
    """The text that a part scores which reads windows."""
    sizes: dict[str, Any] = {"length": setting.length, "max_tokens": setting.max_tokens}
    return scored_texts(subject.model, subject.tokenizer, subject.text, **sizes)


def all_read(subject: Subject, _setting: Setting) -> list[str]:
    """All of the text: parts that take samples from everywhere in it."""
    return read_documents(subject.text)


def masked_read(subject: Subject, setting: Setting) -> list[str]:
    """The text that part `pseudo-perplexity` scores."""
    sizes: dict[str, Any] = {"length": setting.length, "max_tokens": setting.pseudo_tokens}
    return scored_texts(subject.model, subject.tokenizer, subject.text, **sizes)
