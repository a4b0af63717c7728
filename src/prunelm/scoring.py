"""What a causal model makes of windows of text: losses, confidence, agreement with the dense model; one record each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from .intervals import weighted_error
from .sites import find_blocks

BINS = 15
"""Equal ranges of confidence, for the calibration error."""
Record = dict[str, Any]


@torch.no_grad()
def score_windows(
    model: PreTrainedModel, windows: Int[Tensor, "window token"], dense: PreTrainedModel | None = None
) -> list[Record]:
    """A JSON-able record of each window: `tokens` predicted, mean `loss` in nats, `bins` of confidence, `by_position`.

    With `dense`, also its own record under `dense`, the summed KL(dense || model), and how often both choose the `same`
    token. All windows go through the models at once; no token sees another window.
    """
    return records_of(_logits(model, windows), windows, _logits(dense, windows) if dense is not None else None)


def records_of(
    logits: Float[Tensor, "window predicted vocab"],
    windows: Int[Tensor, "window token"],
    dense: Float[Tensor, "window predicted vocab"] | None = None,
) -> list[Record]:
    """The records of windows, from what one model, or two, predict of all their tokens but the first."""
    theirs = [None] * len(windows) if dense is None else dense
    return [_record(mine, window[1:], other) for mine, window, other in zip(logits, windows, theirs, strict=True)]


def _logits(model: PreTrainedModel, windows: Tensor) -> Float[Tensor, "window token vocab"]:
    found: Tensor = model(windows.to(model.device)).logits
    return found[:, :-1]


def _record(
    logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"], dense: Float[Tensor, "token vocab"] | None
) -> Record:
    logits, targets = logits.float(), targets.to(logits.device)
    record = _own(logits, targets)
    if dense is not None:
        dense = dense.float().to(logits.device)
        kl = kl_div(logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        record["kl"] = float(kl.sum())
        record["same"] = int((logits.argmax(-1) == dense.argmax(-1)).sum())
        record["dense"] = _own(dense, targets)
    return record


def _own(logits: Float[Tensor, "token vocab"], targets: Int[Tensor, " token"]) -> Record:
    losses = cross_entropy(logits, targets, reduction="none")
    confidence, choice = logits.softmax(-1).max(-1)
    return {
        "tokens": len(targets),
        "loss": float(losses.mean()),
        "by_position": [[int(end), float(part.sum())] for end, part in _by_position(losses)],
        "bins": confidence_bins(confidence, choice == targets),
    }


def _by_position(losses: Float[Tensor, " token"]) -> list[tuple[int, Tensor]]:
    """Losses split where the number of tokens seen doubles, with the last position of each part."""
    ends = [2**k for k in range(3, 40) if 2**k < len(losses)]
    ends.append(len(losses))
    starts = [0, *ends[:-1]]
    return [(end, losses[start:end]) for start, end in zip(starts, ends, strict=True)]


def confidence_bins(confidence: Float[Tensor, " token"], right: Tensor) -> list[list[float]]:
    """Per range of confidence: tokens, summed confidence, right choices."""
    place = (confidence.nan_to_num() * BINS).long().clamp(0, BINS - 1)
    columns = (torch.ones_like(confidence), confidence.nan_to_num(), right.float())
    sums = [torch.zeros(BINS, device=place.device).index_add_(0, place, column) for column in columns]
    return torch.stack(sums, 1).tolist()


def mean_loss(records: Sequence[Mapping[str, Any]]) -> float:
    """Nats per token over all windows."""
    total: float = sum(r["loss"] * r["tokens"] for r in records)
    tokens: int = sum(r["tokens"] for r in records)
    return total / tokens


def mean_and_error(records: Sequence[Mapping[str, Any]]) -> tuple[float, float | None]:
    """Mean loss over all tokens, and its standard error over windows, which may be unequal; None of a single one."""
    losses, tokens = ([record[name] for record in records] for name in ("loss", "tokens"))
    return mean_loss(records), weighted_error(losses, tokens)


def calibration_error(records: Sequence[Mapping[str, Any]]) -> float:
    """Sum over bins of share x |accuracy - mean confidence|: how far stated probabilities are from what comes true.

    Source: arXiv 1706.04599, Eq. 3, over predicted tokens, with 15 equal ranges.
    """
    bins = torch.tensor([r["bins"] for r in records], dtype=torch.float64).sum(0)
    return float((bins[:, 2] - bins[:, 1]).abs().sum() / bins[:, 0].sum())


def perplexity_by_position(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Exp of the mean loss of the tokens up to each position, since the position before; `until` counts tokens seen."""
    ends = [end for end, _ in records[0]["by_position"]]
    found = []
    for k, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        mean = sum(r["by_position"][k][1] for r in records) / ((end - start) * len(records))
        found.append({"from": start + 1, "until": end, "perplexity": math.exp(mean)})
    return found


@torch.no_grad()
def first_bad_block(model: PreTrainedModel, ids: Int[Tensor, "window token"]) -> str:
    """Where in a forward pass the first value that is not finite comes from, in words."""
    _, blocks = find_blocks(model)
    met: list[str] = []

    def watch(name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        if not met and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
            met.append(name)

    def before(_module: Any, args: Any, kwargs: Any) -> None:
        watch("the embeddings", kwargs.get("hidden_states", args[0] if args else None))

    handles = [blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
    for i, block in enumerate(blocks):
        handles.append(block.register_forward_hook(lambda _m, _a, out, i=i: watch(f"block {i}", out)))
    try:
        model(ids.to(model.device))
    finally:
        for handle in handles:
            handle.remove()
    return met[0] if met else "the head"
