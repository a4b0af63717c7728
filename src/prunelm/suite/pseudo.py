"""Part `pseudo-perplexity` of masked models: every token masked in turn."""

import functools
import math
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..data import check_ids, padded_batches
from ..encoders import mask_id, texts_of
from ..errors import DataError, EvaluationError
from ..intervals import ratio_of
from ..journal import Journal
from ..progress import Progress
from ..scoring import first_bad_block
from . import Setting, Subject

COPIES = 32


def pseudo_perplexity(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Exp of the mean loss of a token given all others of its text, over the first `pseudo_tokens` tokens.

    Source: arXiv 1910.14659, Eq. 4 and the definition of PPPL below it.

    Raises:
        DataError: no token can be masked.
        EvaluationError: losses are not finite; names the text.
    """
    length = min(setting.length, subject.model.config.max_position_embeddings)
    rows: list[dict[str, Any]] = []
    texts = texts_of(subject.text, subject.tokenizer, setting.pseudo_tokens)
    for i, text in enumerate(texts):
        progress("pseudo-perplexity", i, len(texts))
        rows.append(journal.entry(functools.partial(_text, subject, text, length)))
    progress("pseudo-perplexity", len(texts), len(texts))
    kept = [row for row in rows if row["tokens"]]
    if not kept:
        raise DataError(f"{subject.text}: too short to mask a single token")
    counts = [row["tokens"] for row in kept]
    found: dict[str, Any] = {"tokens": sum(counts), "texts": len(kept)}
    for name in subject.models:
        found[name] = {"value": math.exp(sum(row[name] * n for row, n in zip(kept, counts, strict=True)) / sum(counts))}
    if subject.dense is not None:
        found["ratio"] = ratio_of([r["model"] for r in kept], [r["dense"] for r in kept], counts, seed=setting.seed)
    return found


def _text(subject: Subject, text: str, length: int) -> dict[str, Any]:
    (batch,) = padded_batches([text], subject.tokenizer, length, 1)
    check_ids(subject.model.config, [batch])
    ids = batch["input_ids"][0]
    special = torch.isin(ids, torch.tensor(subject.tokenizer.all_special_ids))
    places = (~special).nonzero().flatten()
    found: dict[str, Any] = {"tokens": len(places)}
    for name, model in subject.models.items():
        losses = _losses(model, ids, places, mask_id(subject.tokenizer)) if len(places) else [0.0]
        found[name] = sum(losses) / len(losses)
        if not math.isfinite(found[name]):
            raise EvaluationError(
                f"{subject.text}: the {name} gave a non-finite loss for {text[:40]!r}, where "
                f"{first_bad_block(model, ids[None])} gave the first that is not finite. The weights are damaged, "
                "or overflowed when they were written."
            )
    return found


@torch.no_grad()
def _losses(model: PreTrainedModel, ids: torch.Tensor, places: torch.Tensor, mask: int) -> list[float]:
    losses: list[float] = []
    for some in torch.split(places, COPIES):
        copies = ids.repeat(len(some), 1)
        row = torch.arange(len(some))
        copies[row, some] = mask
        logits = model(input_ids=copies.to(model.device)).logits.cpu()[row, some].float()
        losses += cross_entropy(logits, ids[some], reduction="none").tolist()
    return losses
