"""What pruning cost: perplexity with its error, bits per byte, and agreement with the dense model."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import JOIN, check_ids, check_length, describe, prefix_ids, read_documents, split_windows, token_ids
from .encoders import Questions, answered, asked_for, check_texts, questions, score_texts
from .errors import DataError, EvaluationError
from .intervals import ratio_of
from .journal import Journal
from .progress import Progress, silent
from .scoring import Record, first_bad_block, mean_and_error, score_windows
from .stream import Batch
from .tasks import task_of

Score = Callable[[Sequence[Int[Tensor, " length"]], int], list[Record]]
"""(all windows, which of them) -> its records."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured quality of one model on one text, with all that must be said beside it.

    `metric` is `perplexity`, `masked perplexity`, `accuracy` or `embedding`; `error` its standard error over windows
    (texts, for encoders). `kl` is the mean KL(dense || model) per token in nats, `top1` the share of tokens where
    both choose the same; `cosine` the mean cosine of mean-pooled embeddings. `ratio` to the dense perplexity, or
    `difference` of accuracies, with intervals, paired by window. None where it does not apply.
    """

    metric: str
    value: float | None
    error: float | None
    bits_per_byte: float | None = None
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None
    ratio: dict[str, Any] | None = None
    difference: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Path,
    *,
    against: PreTrainedModel | None = None,
    length: int = 1024,
    max_tokens: int | None = None,
    seed: int = 0,
    score: Score | None = None,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """The quality of a model on a text that it was not calibrated on.

    Causal models: exp of the mean next-token loss over non-overlapping windows of `length` tokens. Masked models: the
    same over a seeded 15 % of tokens that are masked. Classifiers: accuracy on labeled lines. Bare encoders: cosine
    to the dense model's embeddings.

    Args:
        model: in eval mode.
        tokenizer: of the model, and of `against`.
        text: file or folder; see `read_documents`, and `read_labeled` for classifiers.
        against: the dense model, for KL, agreement and cosine.
        length: tokens in a window.
        max_tokens: stop after this many tokens of text.
        seed: of the masking.
        score: makes the records of a window in place of `score_windows`, for causal models that are not in memory.
        journal: of windows that are not measured again.
        progress: told about every window.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite, or the two models cannot be compared.
    """
    task = task_of(model)
    if against is not None:
        check_comparable(model, against)
    if task == "causal":
        kept = journal or Journal()
        return _perplexity(model, tokenizer, Path(text), against, length, max_tokens, score, kept, progress)
    return _encoder(
        task, model, tokenizer, Path(text), against, length, max_tokens, seed, journal or Journal(), progress
    )


def check_comparable(model: PreTrainedModel, against: PreTrainedModel) -> None:
    """Raise unless two models answer the same question with the same vocabulary.

    Raises:
        EvaluationError: says what differs.
    """
    sizes = (model.config.vocab_size, against.config.vocab_size)
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"the two models cannot be compared: vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens"
        )
    if task_of(model) != task_of(against):
        raise EvaluationError(
            f"the two models cannot be compared: {type(model).__name__} and {type(against).__name__} do different tasks"
        )


PROBE = "The tokenizers must agree:\n\t1,024 words, naïve façades & 'quotes' \U0001f642.  2 spaces"


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> None:
    """Raise unless the tokenizers of two models make the same tokens of one odd sentence.

    Raises:
        EvaluationError: says how many tokens each makes.
    """
    ours, theirs = token_ids(PROBE, tokenizer), token_ids(PROBE, other)
    if ours != theirs:
        raise EvaluationError(
            f"the two models cannot be compared: their tokenizers make {len(ours)} and {len(theirs)} tokens, not the "
            "same ones, of one sentence. Losses per token and KL mean nothing then; compare models of one tokenizer."
        )


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    score: Score | None,
    journal: Journal,
    progress: Progress,
) -> Evaluation:
    windows = text_windows(JOIN.join(read_documents(text)), str(text), model, tokenizer, length, max_tokens)
    batches: list[Batch] = [{"input_ids": w[None]} for w in windows]
    records, size = [], 0
    for i, window in enumerate(windows):
        progress("evaluating", i, len(windows))
        if score is None:
            make = functools.partial(score_windows, model, window[None], against)
        else:
            make = functools.partial(score, windows, i)
        records += journal.entry(lambda make=make: {"windows": make()})["windows"]  # type: ignore[misc]
        size += window_bytes(window, tokenizer)
    progress("evaluating", len(windows), len(windows))
    check_losses(model, windows, records, str(text))
    mean, error = mean_and_error(records)
    predicted = sum(r["tokens"] for r in records)
    ratio = None
    if against is not None:
        dense = [r["dense"]["loss"] for r in records]
        ratio = ratio_of([r["loss"] for r in records], dense, [r["tokens"] for r in records])
    return Evaluation(
        metric="perplexity",
        value=math.exp(mean),
        error=None if error is None else math.exp(mean) * error,
        bits_per_byte=mean * predicted / math.log(2) / size,
        kl=sum(r["kl"] for r in records) / predicted if against is not None else None,
        top1=sum(r["same"] for r in records) / predicted if against is not None else None,
        ratio=ratio,
        facts=describe(batches, tokenizer, text=text.name, length=length, predicted=predicted),
    )


def text_windows(
    text: str,
    where: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_tokens: int | None,
) -> list[Int[Tensor, " length"]]:
    """Non-overlapping windows of a text, each beginning as the tokenizer begins texts; at least one.

    Raises:
        DataError: the text does not fill one window, the model cannot read as many tokens, or does not know them all.
    """
    check_length(model.config, length)
    ids = token_ids(text, tokenizer)[:max_tokens]
    windows = split_windows(ids, length, prefix_ids(tokenizer))
    if not windows:
        cut = max_tokens is not None and len(ids) == max_tokens
        more = f", or more than --max-tokens {max_tokens:,}" if cut else ""
        raise DataError(
            f"{where}: it gives {len(ids):,} tokens, but one window needs {length:,}. Use a smaller --length{more}."
        )
    check_ids(model.config, [{"input_ids": w[None]} for w in windows])
    return windows


def window_bytes(window: Int[Tensor, " length"], tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of text that a window predicts; its first token is given."""
    return len(tokenizer.decode(window[1:].tolist()).encode())


def check_losses(
    model: PreTrainedModel, windows: Sequence[Int[Tensor, " length"]], records: Sequence[Record], where: str
) -> None:
    """Raise if a loss is not finite.

    Raises:
        EvaluationError: names the first window and the first block that made it so.
    """
    bad = [i for i, record in enumerate(records) if not math.isfinite(record["loss"])]
    if bad:
        raise EvaluationError(
            f"{where}: {len(bad)} of {len(records)} windows gave a non-finite loss, first window {bad[0]}, where "
            f"{first_bad_block(model, windows[bad[0]][None])} gave the first value that is not finite. "
            "The weights are damaged, or overflowed when they were written."
        )


def _encoder(
    task: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    seed: int,
    journal: Journal,
    progress: Progress,
) -> Evaluation:
    check_embeddings(model, against)
    asked = questions(task, model, tokenizer, text, length=length, max_tokens=max_tokens, seed=seed)
    records: list[Record] = []
    for i, question in enumerate(asked.asked):
        progress("evaluating", i, len(asked.asked))
        make = functools.partial(score_texts, model, question, asked.mask, against)
        records += journal.entry(lambda make=make: {"texts": make()})["texts"]  # type: ignore[misc]
    progress("evaluating", len(asked.asked), len(asked.asked))
    found = encoder_numbers(model, against, asked, records, str(text), seed)
    means = {name: found[name]["value"] for name in ("kl", "cosine") if name in found}
    numbers: dict[str, Any] = {name: found.get(name) for name in _NUMBERS}
    return Evaluation(**numbers, **means, facts=found["facts"])


_NUMBERS = ("metric", "value", "error", "top1", "ratio", "difference")


def check_embeddings(model: PreTrainedModel, against: PreTrainedModel | None) -> None:
    """Raise if the outputs of a bare encoder cannot be compared.

    Raises:
        EvaluationError: there is no dense model, or its embeddings are of another width.
    """
    if task_of(model) != "embedding":
        return
    if against is None:
        raise EvaluationError(f"{type(model).__name__} has no head, so it can only be compared: give --against DENSE")
    sizes = [int(m.config.hidden_size) for m in (model, against)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(f"the two models cannot be compared: embeddings of {sizes[0]} and {sizes[1]} channels")


def encoder_numbers(
    model: PreTrainedModel,
    against: PreTrainedModel | None,
    asked: Questions,
    records: Sequence[Record],
    where: str,
    seed: int,
) -> dict[str, Any]:
    """What an encoder's records say, all values finite; see `answered`.

    Raises:
        DataError: nothing could be asked.
        EvaluationError: values are not finite; names the text and the block.
    """
    kept = asked_for(asked.task, records, where)
    check_texts(model, asked, records, where, kept)
    if against is not None:
        check_texts(against, asked, [r["dense"] for r in records], f"{where}, dense model", kept)
    found = answered(asked.task, [records[k] for k in kept], seed)
    asked_of = sum(records[k]["tokens"] for k in kept)
    return {**found, "facts": {**asked.facts, "predicted": asked_of, "seed": seed}}
