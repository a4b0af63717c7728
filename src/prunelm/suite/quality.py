"""Part `quality`: what the model's own task says, paired window by window with the dense model."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import JOIN, describe, read_documents
from ..encoders import Question, Questions, questions, score_texts
from ..evaluation import check_embeddings, check_losses, encoder_numbers, text_windows, window_bytes
from ..intervals import interval, ratio_of
from ..journal import Journal
from ..progress import Progress
from ..scoring import Record, calibration_error, mean_and_error, score_windows
from ..tasks import task_of
from . import Setting, Subject


def quality(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Perplexity with bits per byte, calibration error and agreement; for encoders what `prunelm.evaluate` measures.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite; names the window and the block.
    """
    if task_of(subject.model) != "causal":
        return _encoder(subject, setting, journal, progress)
    text = JOIN.join(read_documents(subject.text))
    windows = text_windows(
        text, str(subject.text), subject.model, subject.tokenizer, setting.length, setting.max_tokens
    )
    records = scored(subject, windows, setting, journal, progress, "quality")
    size = sum(window_bytes(window, subject.tokenizer) for window in windows)
    facts = describe([{"input_ids": w[None]} for w in windows], subject.tokenizer, text=subject.text.name)
    return {"facts": facts, "metric": "perplexity", **perplexities(records, size, setting.seed)}


def scored(
    subject: Subject,
    windows: Sequence[torch.Tensor],
    setting: Setting,
    journal: Journal,
    progress: Progress,
    stage: str,
    where: str | None = None,
) -> list[Record]:
    """The records of all windows, by the settings of a suite; see `windows_scored`."""
    named: dict[str, Any] = {"stage": stage, "where": where or str(subject.text), "batch_size": setting.batch_size}
    return windows_scored(subject.model, subject.dense, windows, journal=journal, progress=progress, **named)


def windows_scored(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    windows: Sequence[torch.Tensor],
    *,
    journal: Journal,
    progress: Progress,
    stage: str,
    where: str,
    batch_size: int = 1,
) -> list[Record]:
    """The records of all windows, those that the journal knows not made again; all losses are finite."""
    records: list[Record] = []
    for start in range(0, len(windows), batch_size):
        progress(stage, start, len(windows))
        some = torch.stack(list(windows[start : start + batch_size]))
        records += journal.entry(functools.partial(_entry, model, dense, some))["windows"]
    progress(stage, len(windows), len(windows))
    check_losses(model, windows, records, where)
    if dense is not None:
        check_losses(dense, windows, [r["dense"] for r in records], f"{where}, dense model")
    return records


def _entry(model: PreTrainedModel, dense: PreTrainedModel | None, windows: torch.Tensor) -> dict[str, Any]:
    return {"windows": score_windows(model, windows, dense)}


def perplexities(records: Sequence[Record], size: int, seed: int) -> dict[str, Any]:
    """What some records say: the model's own numbers and, where they hold the dense model's, both and their ratio."""
    found: dict[str, Any] = _own(records, size)
    if "dense" not in records[0]:
        return found
    dense = [r["dense"] for r in records]
    counts = [r["tokens"] for r in records]
    kl = [r["kl"] / r["tokens"] for r in records]
    low, high = interval(kl, counts, seed=seed)
    return {
        **found,
        "dense": _own(dense, size),
        "ratio": ratio_of([r["loss"] for r in records], [r["loss"] for r in dense], counts, seed=seed),
        "kl": {"value": sum(r["kl"] for r in records) / sum(counts), "low": low, "high": high},
        "top1": sum(r["same"] for r in records) / sum(counts),
        "windows": [[round(r["loss"], 5), round(r["dense"]["loss"], 5)] for r in records],
    }


def _own(records: Sequence[Record], size: int) -> dict[str, Any]:
    mean, error = mean_and_error(records)
    tokens = sum(r["tokens"] for r in records)
    return {
        "value": math.exp(mean),
        "error": None if error is None else math.exp(mean) * error,
        "bits_per_byte": mean * tokens / math.log(2) / size,
        "calibration_error": calibration_error(records),
        "predicted": tokens,
    }


def _encoder(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    model, dense, task = subject.model, subject.dense, task_of(subject.model)
    check_embeddings(model, dense)
    sizes: dict[str, Any] = {"length": setting.length, "max_tokens": setting.max_tokens, "seed": setting.seed}
    asked = questions(task, model, subject.tokenizer, subject.text, **sizes)
    return answers(subject, asked, setting, journal, progress, "quality", str(subject.text))


def answers(
    subject: Subject,
    asked: Questions,
    setting: Setting,
    journal: Journal,
    progress: Progress,
    stage: str,
    where: str,
) -> dict[str, Any]:
    """What both encoders answer to some questions, those that the journal knows not asked again."""
    records: list[Record] = []
    for i, question in enumerate(asked.asked):
        progress(stage, i, len(asked.asked))
        ask = functools.partial(_texts, subject.model, subject.dense, question, asked.mask)
        records += journal.entry(ask)["texts"]
    progress(stage, len(asked.asked), len(asked.asked))
    return encoder_numbers(subject.model, subject.dense, asked, records, where, setting.seed)


def _texts(
    model: PreTrainedModel, dense: PreTrainedModel | None, question: Question, mask: int | None
) -> dict[str, Any]:
    return {"texts": score_texts(model, question, mask, dense)}
