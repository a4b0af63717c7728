"""Measured speed: prefill tokens per second, models interleaved so that their ratio holds on a noisy machine."""

import inspect
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def prefill_speed(
    models: Sequence[PreTrainedModel], *, length: int = 512, batch: int = 1, rounds: int = 7
) -> list[float]:
    """Median tokens per second of one forward pass over a prompt, one number per model.

    As when a text is generated, only the last token's logits are computed, where the model can do that.
    Models take turns round by round after one round of warm-up, so that a slow moment hits all of them.
    """
    times: list[list[float]] = [[] for _ in models]
    for turn in range(rounds + 1):
        for model, mine in zip(models, times, strict=True):
            limit = getattr(model.config, "max_position_embeddings", None) or length
            ids = torch.arange(min(length, limit))[None].expand(batch, -1) % model.config.vocab_size
            ids = ids.to(model.device)
            start = time.perf_counter()
            model(input_ids=ids, **_last_logits(model))
            if turn:
                mine.append((time.perf_counter() - start) / ids.numel())
    return [1 / statistics.median(mine) for mine in times]


def _last_logits(model: PreTrainedModel) -> dict[str, Any]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
