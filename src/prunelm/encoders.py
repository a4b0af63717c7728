"""What an encoder makes of texts: hidden tokens, labels, embeddings; a record each, beside the dense model's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import check_ids, check_labels, describe, padded_batches, read_documents, read_labeled, token_ids
from .errors import DataError, EvaluationError
from .intervals import interval, ratio_of
from .losses import MASKED_SHARE
from .scoring import Record, calibration_error, confidence_bins, first_bad_block, mean_and_error
from .stream import Batch

AT_ONCE = 32
"""Texts that go through a model at once."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A padded batch of texts, and what is asked of each: the tokens that are hidden, or its label."""

    batch: Batch
    hidden: Bool[Tensor, "text token"] | None = None
    labels: Int[Tensor, " text"] | None = None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All questions of a text file, and the facts about them that every result must carry."""

    task: str
    asked: list[Question]
    mask: int | None
    facts: dict[str, Any]


def questions(
    task: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Path,
    *,
    length: int,
    max_tokens: int | None,
    seed: int,
    change: Callable[[str, int], str] | None = None,
) -> Questions:
    """What a masked model, a classifier or a bare encoder is asked about a file.

    `change` alters every text before, told its place.

    Raises:
        DataError: no label where one is needed, or token ids that the model does not know.
        EvaluationError: the tokenizer has no mask token.
    """
    length = min(length, model.config.max_position_embeddings)
    texts, numbers = labeled_texts(task, text, tokenizer, max_tokens)
    labels = torch.tensor(numbers) if numbers is not None else None
    if numbers is not None:
        check_labels(model.config, numbers)
    texts = [change(one, k) for k, one in enumerate(texts)] if change is not None else texts
    batches = padded_batches(texts, tokenizer, length, AT_ONCE)
    check_ids(model.config, batches)
    generator, asked = torch.Generator().manual_seed(seed), []
    for k, batch in enumerate(batches):
        hidden = _hidden(batch, tokenizer, generator) if task == "masked" else None
        answers = labels[k * AT_ONCE : (k + 1) * AT_ONCE] if labels is not None else None
        asked.append(Question(batch=batch, hidden=hidden, labels=answers))
    mask = mask_id(tokenizer) if task == "masked" else None
    facts = describe(batches, tokenizer, text=text.name, length=length)
    return Questions(task=task, asked=asked, mask=mask, facts=facts)


@torch.no_grad()
def score_texts(
    model: PreTrainedModel, question: Question, mask: int | None, dense: PreTrainedModel | None = None
) -> list[Record]:
    """A JSON-able record of each text: its `loss`, what was `right`, how many `tokens` (or labels) were asked for.

    With `dense`, also its own record under `dense`, the summed KL(dense || model), how often both choose the `same`,
    and the `cosine` of the mean-pooled last hidden states where both are of one width.
    """
    batch = question.batch
    if question.hidden is not None and mask is not None:
        batch = {**batch, "input_ids": batch["input_ids"].masked_fill(question.hidden, mask)}
    mine = _Seen.of(model, batch, question.hidden)
    theirs = _Seen.of(dense, batch, question.hidden) if dense is not None else None
    return [_record(mine, theirs, question, k) for k in range(len(batch["input_ids"]))]


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """Per text, on the CPU: the logits at its places, where the model has some, and its pooled last hidden state."""

    logits: list[Float[Tensor, "_ class"]] | None
    pooled: Float[Tensor, "text channel"]

    @classmethod
    def of(cls, model: PreTrainedModel, batch: Batch, hidden: Bool[Tensor, "text token"] | None) -> "_Seen":
        there = {name: value.to(model.device) for name, value in batch.items()}
        result = model(**there, output_hidden_states=True)
        last = getattr(result, "last_hidden_state", None)
        last = (result.hidden_states[-1] if last is None else last).float()
        real = there["attention_mask"][..., None].float()
        logits, split = getattr(result, "logits", None), None
        if logits is not None and hidden is not None:
            split = list(logits[hidden.to(logits.device)].float().cpu().split(hidden.sum(1).tolist()))
        elif logits is not None:
            split = list(logits.float().cpu().split(1))
        return cls(logits=split, pooled=((last * real).sum(1) / real.sum(1)).cpu())


def _record(mine: _Seen, theirs: _Seen | None, question: Question, k: int) -> Record:
    wanted = _wanted(question, k)
    record = _own(mine.logits[k], wanted) if mine.logits is not None else _pooled_only(mine.pooled[k])
    if theirs is None:
        return record
    if mine.logits is not None and theirs.logits is not None:
        one, other = mine.logits[k], theirs.logits[k]
        kl = kl_div(one.log_softmax(-1), other.log_softmax(-1), log_target=True, reduction="sum")
        record |= {"kl": float(kl), "same": int((one.argmax(-1) == other.argmax(-1)).sum())}
    record["dense"] = _own(theirs.logits[k], wanted) if theirs.logits is not None else _pooled_only(theirs.pooled[k])
    if mine.pooled.shape == theirs.pooled.shape:
        record["cosine"] = float(cosine_similarity(mine.pooled[k], theirs.pooled[k], dim=0))
    return record


def _wanted(question: Question, k: int) -> Int[Tensor, " row"]:
    """The right answers about a text: the tokens that are hidden, its label, or none."""
    if question.hidden is not None:
        return question.batch["input_ids"][k][question.hidden[k]]
    return question.labels[k : k + 1] if question.labels is not None else torch.zeros(0, dtype=torch.int64)


def _pooled_only(pooled: Float[Tensor, " channel"]) -> Record:
    return {"tokens": 1, "loss": 0.0 if bool(torch.isfinite(pooled).all()) else math.nan}


def _own(logits: Float[Tensor, "row class"], wanted: Int[Tensor, " row"]) -> Record:
    known = (wanted >= 0) & (wanted < logits.shape[-1])
    losses = cross_entropy(logits, wanted.where(known, -100), reduction="none")
    confidence, choice = logits.softmax(-1).max(-1)
    return {
        "tokens": len(wanted),
        "loss": float(losses.mean()) if len(wanted) else 0.0,
        "right": int((choice == wanted).sum()),
        "bins": confidence_bins(confidence, choice == wanted),
    }


def check_texts(
    model: PreTrainedModel, asked: Questions, records: Sequence[Record], where: str, kept: Sequence[int]
) -> None:
    """Raise if a value is not finite; `records` of all texts, `kept` the numbers of those that were asked something.

    Raises:
        EvaluationError: names the first text and the first block that made it so.
    """
    bad = [k for k in kept if not math.isfinite(records[k]["loss"])]
    if bad:
        batch = asked.asked[bad[0] // AT_ONCE].batch
        row = bad[0] % AT_ONCE
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        raise EvaluationError(
            f"{where}: {len(bad)} of {len(kept)} texts gave values that are not finite, first text {bad[0]}, where "
            f"{first_bad_block(model, ids[None])} gave the first. The weights are damaged, or overflowed when they "
            "were written."
        )


def labeled_texts(
    task: str, text: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> tuple[list[str], list[int] | None]:
    """The texts that an encoder is asked about, cut off once they hold `max_tokens`, and a classifier's labels.

    Raises:
        DataError: cannot be read, or no label where one is needed.
    """
    if task != "classifier":
        return texts_of(text, tokenizer, max_tokens), None
    rows = _cut(read_labeled(text), tokenizer, max_tokens)
    return [sentence for sentence, _ in rows], [label for _, label in rows]


def texts_of(text: Path, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[str]:
    """Documents of a file (lines of a plain text), cut off once they hold `max_tokens`."""
    documents = read_documents(text)
    if text.suffix != ".jsonl":
        documents = [line for document in documents for line in document.splitlines() if line.strip()]
    return [document for document, _ in _cut([(document, 0) for document in documents], tokenizer, max_tokens)]


def _cut(
    rows: list[tuple[str, int]], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None
) -> list[tuple[str, int]]:
    """The first rows, as many as hold `max_tokens` tokens."""
    if max_tokens is None:
        return rows
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


def _hidden(batch: Batch, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> Bool[Tensor, "text token"]:
    """A seeded 15 % of the real, non-special tokens; which ones does not hang on the padding beside them."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    drawn = torch.ones(ids.shape)
    for row, mine in zip(drawn, real, strict=True):
        row[mine] = torch.rand(int(mine.sum()), generator=generator)
    return (drawn < MASKED_SHARE) & ~special & real


def asked_for(task: str, records: Sequence[Record], where: str) -> list[int]:
    """The numbers of the texts of which anything was asked.

    Raises:
        DataError: there are none.
    """
    kept = [k for k, record in enumerate(records) if record["tokens"]]
    if not kept:
        raise DataError(f"{where}: too short to mask a single token" if task == "masked" else f"{where}: no text")
    return kept


METRICS = {"masked": "masked perplexity", "classifier": "accuracy", "embedding": "embedding"}


def answered(task: str, records: Sequence[Record], seed: int = 0) -> dict[str, Any]:
    """What some records say; every interval pairs both models text by text.

    `ratio` of masked perplexities; `difference` of accuracies, with how many texts were `lost` and `gained`.
    """
    found: dict[str, Any] = {"metric": METRICS[task], **_alone(task, records)}
    if "dense" not in records[0]:
        return found
    dense, counts = [r["dense"] for r in records], [r["tokens"] for r in records]
    if task != "embedding":
        found["dense"] = _alone(task, dense)
        found["kl"] = _mean([r["kl"] / r["tokens"] for r in records], counts, seed)
        found["top1"] = sum(r["same"] for r in records) / sum(counts)
    if task == "masked":
        found["ratio"] = ratio_of([r["loss"] for r in records], [r["loss"] for r in dense], counts, seed=seed)
    if task == "classifier":
        changes = [float(mine["right"] - theirs["right"]) for mine, theirs in zip(records, dense, strict=True)]
        found["difference"] = {**_mean(changes, counts, seed), "lost": changes.count(-1), "gained": changes.count(1)}
    if "cosine" in records[0]:
        found["cosine"] = _mean([r["cosine"] for r in records], None, seed)
    return found


def _alone(task: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What one model's records say: nothing of a bare encoder, which can only be compared."""
    if task == "embedding":
        return {}
    if task == "masked":
        mean, error = mean_and_error(records)
        value, error = math.exp(mean), None if error is None else math.exp(mean) * error
    else:
        value = sum(r["right"] for r in records) / len(records)
        error = math.sqrt(value * (1 - value) / len(records)) if len(records) > 1 else None
    predicted = sum(r["tokens"] for r in records)
    return {"value": value, "error": error, "calibration_error": calibration_error(records), "predicted": predicted}


def _mean(values: Sequence[float], counts: Sequence[int] | None, seed: int) -> dict[str, float | None]:
    weights = counts or [1] * len(values)
    low, high = interval(values, counts, seed=seed)
    value = sum(v * n for v, n in zip(values, weights, strict=True)) / sum(weights)
    return {"value": value, "low": low, "high": high}
