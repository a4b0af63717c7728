"""What pruning cost: perplexity with its error, bits per byte, and agreement with the dense model."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import (
    JOIN,
    check_ids,
    check_length,
    describe,
    padded_batches,
    prefix_ids,
    read_documents,
    read_labeled,
    split_windows,
    token_ids,
)
from .errors import DataError, EvaluationError
from .losses import MASKED_SHARE
from .progress import Progress, silent
from .scoring import Record, first_bad_block, mean_loss, score_windows
from .stream import Batch
from .tasks import task_of

ENCODER_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Measured quality of one model on one text, with all that must be said beside it.

    `metric` is `perplexity`, `masked perplexity`, `accuracy` or `embedding`; `error` its standard error over windows
    (texts, for encoders). `kl` is the mean KL(dense || model) per token in nats, `top1` the share of tokens where
    both choose the same; `cosine` the mean cosine of mean-pooled embeddings. None where it does not apply.
    """

    metric: str
    value: float | None
    error: float | None
    bits_per_byte: float | None = None
    kl: float | None = None
    top1: float | None = None
    cosine: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able data."""
        return asdict(self)


@dataclass
class _Sums:
    """Sums over windows, and what agreement with the dense model adds up to."""

    losses: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    kl: float = 0.0
    same: int = 0
    compared: int = 0

    def agree(self, logits: Float[Tensor, "token vocab"], dense: Float[Tensor, "token vocab"]) -> None:
        self.kl += float(kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum"))
        self.same += int((logits.argmax(-1) == dense.argmax(-1)).sum())
        self.compared += len(logits)

    def agreement(self) -> dict[str, float | None]:
        if not self.compared:
            return {"kl": None, "top1": None}
        return {"kl": self.kl / self.compared, "top1": self.same / self.compared}


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
        progress: told about every window.

    Raises:
        DataError: the text does not fill one window.
        EvaluationError: losses are not finite, or the two models cannot be compared.
    """
    task = task_of(model)
    if against is not None:
        check_comparable(model, against)
    if task == "causal":
        return _perplexity(model, tokenizer, Path(text), against, length, max_tokens, progress)
    return _ENCODERS[task](model, tokenizer, Path(text), against, length, max_tokens, seed, progress)


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


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    progress: Progress,
) -> Evaluation:
    windows = text_windows(JOIN.join(read_documents(text)), str(text), model, tokenizer, length, max_tokens)
    batches: list[Batch] = [{"input_ids": w[None]} for w in windows]
    records, size = [], 0
    for i, window in enumerate(windows):
        progress("evaluating", i, len(windows))
        records += score_windows(model, window[None], against)
        size += window_bytes(window, tokenizer)
    progress("evaluating", len(windows), len(windows))
    check_losses(model, windows, records, str(text))
    mean, error = mean_and_error(records)
    predicted = sum(r["tokens"] for r in records)
    return Evaluation(
        metric="perplexity",
        value=math.exp(mean),
        error=math.exp(mean) * error,
        bits_per_byte=mean * predicted / math.log(2) / size,
        kl=sum(r["kl"] for r in records) / predicted if against is not None else None,
        top1=sum(r["same"] for r in records) / predicted if against is not None else None,
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
        raise DataError(
            f"{where}: it gives {len(ids):,} tokens, but one window needs {length:,}. Use a smaller --length."
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
            "The arithmetic overflows or the weights are damaged: try --dtype float32."
        )


def mean_and_error(records: Sequence[Record]) -> tuple[float, float]:
    """Mean loss over all tokens, and its standard error over windows."""
    losses = [record["loss"] for record in records]
    spread = statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    return mean_loss(records), spread


def _mean_and_error(sums: _Sums, where: str) -> tuple[float, float]:
    """Mean loss over all tokens, and its standard error over texts."""
    bad = [i for i, loss in enumerate(sums.losses) if not math.isfinite(loss)]
    if bad:
        raise EvaluationError(
            f"{where}: {len(bad)} of {len(sums.losses)} windows gave a non-finite loss, first window {bad[0]}. "
            "The arithmetic overflows or the weights are damaged: try --dtype float32."
        )
    return mean_and_error([{"loss": loss, "tokens": n} for loss, n in zip(sums.losses, sums.counts, strict=True)])


def texts_of(text: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[str]:
    """Documents of a file (lines of a plain text), cut off once they hold `max_tokens`."""
    documents = read_documents(text)
    if text.suffix != ".jsonl":
        documents = [line for document in documents for line in document.splitlines() if line.strip()]
    if max_tokens is None:
        return documents
    taken, tokens = [], 0
    for document in documents:
        if tokens >= max_tokens:
            break
        tokens += len(token_ids(document, tokenizer))
        taken.append(document)
    return taken


def _masked_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    seed: int,
    progress: Progress,
) -> Evaluation:
    length = min(length, model.config.max_position_embeddings)
    batches = padded_batches(texts_of(text, tokenizer, max_tokens), tokenizer, length, ENCODER_BATCH)
    check_ids(model.config, batches)
    generator = torch.Generator().manual_seed(seed)
    sums = _Sums()
    for i, batch in enumerate(batches):
        progress("evaluating", i, len(batches))
        hidden = _masked_positions(batch, tokenizer, generator)
        if not bool(hidden.any()):
            continue
        ids = batch["input_ids"].masked_fill(hidden, mask_id(tokenizer))
        logits = model(**{**batch, "input_ids": ids}).logits[hidden].float()
        losses = cross_entropy(logits, batch["input_ids"][hidden], reduction="none")
        for mine in torch.split(losses, hidden.sum(1).tolist()):
            if len(mine):
                sums.losses.append(float(mine.mean()))
                sums.counts.append(len(mine))
        if against is not None:
            sums.agree(logits, against(**{**batch, "input_ids": ids}).logits[hidden].float())
    progress("evaluating", len(batches), len(batches))
    if not sums.counts:
        raise DataError(f"{text}: too short to mask a single token")
    mean, error = _mean_and_error(sums, str(text))
    return Evaluation(
        metric="masked perplexity",
        value=math.exp(mean),
        error=math.exp(mean) * error,
        **sums.agreement(),
        facts=describe(batches, tokenizer, text=text.name, length=length, predicted=sum(sums.counts), seed=seed),
    )


def _cut(rows: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[tuple[str, int]]:
    """The first rows, as many as hold `max_tokens` tokens."""
    tokens = 0
    for i, (sentence, _) in enumerate(rows):
        tokens += len(token_ids(sentence, tokenizer))
        if tokens >= max_tokens:
            return rows[: i + 1]
    return rows


def mask_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that stands for a hidden token.

    Raises:
        EvaluationError: the tokenizer has none.
    """
    mask = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    if mask is None:
        raise EvaluationError("this tokenizer has no mask token, so a masked loss cannot be measured")
    return int(mask)


def _masked_positions(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator
) -> Bool[Tensor, "sample token"]:
    """A seeded 15 % of the real, non-special tokens."""
    ids = batch["input_ids"]
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    return (torch.rand(ids.shape, generator=generator) < MASKED_SHARE) & ~special & batch["attention_mask"].bool()


def _accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    seed: int,
    progress: Progress,
) -> Evaluation:
    rows = read_labeled(text)
    if max_tokens is not None:
        rows = _cut(rows, tokenizer, max_tokens)
    length = min(length, model.config.max_position_embeddings)
    batches = padded_batches([sentence for sentence, _ in rows], tokenizer, length, ENCODER_BATCH)
    labels = [
        torch.tensor([label for _, label in rows[i : i + ENCODER_BATCH]]) for i in range(0, len(rows), ENCODER_BATCH)
    ]
    check_ids(model.config, batches)
    right, sums = 0, _Sums()
    for i, (batch, wanted) in enumerate(zip(batches, labels, strict=True)):
        progress("evaluating", i, len(batches))
        logits = model(**batch).logits.float()
        if not bool(torch.isfinite(logits).all()):
            raise EvaluationError(f"{text}: non-finite logits in batch {i}. Try --dtype float32.")
        right += int((logits.argmax(-1) == wanted).sum())
        if against is not None:
            sums.agree(logits, against(**batch).logits.float())
    progress("evaluating", len(batches), len(batches))
    share = right / len(rows)
    return Evaluation(
        metric="accuracy",
        value=share,
        error=math.sqrt(share * (1 - share) / len(rows)),
        **sums.agreement(),
        facts=describe(batches, tokenizer, text=text.name, length=length, predicted=len(rows)),
    )


def _embedding(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    against: PreTrainedModel | None,
    length: int,
    max_tokens: int | None,
    seed: int,
    progress: Progress,
) -> Evaluation:
    if against is None:
        raise EvaluationError(f"{type(model).__name__} has no head, so it can only be compared: give --against DENSE")
    sizes = [int(m.config.hidden_size) for m in (model, against)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(f"the two models cannot be compared: embeddings of {sizes[0]} and {sizes[1]} channels")
    length = min(length, model.config.max_position_embeddings)
    batches = padded_batches(texts_of(text, tokenizer, max_tokens), tokenizer, length, ENCODER_BATCH)
    check_ids(model.config, batches)
    cosines: list[float] = []
    for i, batch in enumerate(batches):
        progress("evaluating", i, len(batches))
        cosines += cosine_similarity(_pooled(model, batch), _pooled(against, batch)).tolist()
    progress("evaluating", len(batches), len(batches))
    if not all(math.isfinite(c) for c in cosines):
        raise EvaluationError(f"{text}: non-finite embeddings. Try --dtype float32.")
    return Evaluation(
        metric="embedding",
        value=None,
        error=None,
        cosine=sum(cosines) / len(cosines),
        facts=describe(batches, tokenizer, text=text.name, length=length, predicted=len(cosines)),
    )


def _pooled(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "sample channel"]:
    mask = batch["attention_mask"][..., None].float()
    pooled: Tensor = (model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
    return pooled


_ENCODERS: dict[str, Callable[..., Evaluation]] = {
    "masked": _masked_perplexity,
    "classifier": _accuracy,
    "embedding": _embedding,
}
