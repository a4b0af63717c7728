"""Measured speed: prefill and decode, models interleaved so that their ratio holds on a noisy machine."""

import inspect
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import linear
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
            seconds = prefill_seconds(model, length, batch)
            if turn:
                mine.append(seconds / (_length(model, length) * batch))
    return [1 / statistics.median(mine) for mine in times]


@torch.no_grad()
def prefill_seconds(model: PreTrainedModel, length: int, batch: int = 1) -> float:
    """Seconds of one forward pass over a prompt of that length, or as much of it as the model reads."""
    ids = _prompt(model, _length(model, length)).expand(batch, -1)
    start = clock(model.device)
    model(input_ids=ids, **_last_logits(model))
    return clock(model.device) - start


@torch.no_grad()
def decode_seconds(model: PreTrainedModel, length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first new token stands, and of all the others, each computed from the cache of those before."""
    room = _length(model, length + new_tokens) - new_tokens
    ids = _prompt(model, max(1, min(length, room)))
    start = clock(model.device)
    result = model(input_ids=ids, use_cache=True, **_last_logits(model))
    token = result.logits[:, -1:].argmax(-1)
    first = clock(model.device) - start
    for _ in range(new_tokens - 1):
        result = model(input_ids=token, past_key_values=result.past_key_values, use_cache=True, **_last_logits(model))
        token = result.logits[:, -1:].argmax(-1)
    return first, clock(model.device) - start - first


REPEATED = 0.005
"""Seconds that one measurement of products takes at least, so that the clock's own steps do not count."""


@torch.no_grad()
def product_seconds(
    shapes: Sequence[tuple[int, int]], rows: int, *, device: torch.device, dtype: torch.dtype = torch.float32
) -> float:
    """Seconds of one product with each of some matrices of (inputs, outputs), over so many rows of ones."""
    pairs = [
        (torch.ones(rows, into, device=device, dtype=dtype), torch.ones(out, into, device=device, dtype=dtype))
        for into, out in shapes
    ]
    times, taken = 0, 0.0
    start = clock(device)
    while taken < REPEATED:
        for row, weight in pairs:
            linear(row, weight)
        times += 1
        taken = clock(device) - start
    return taken / times


def clock(device: torch.device) -> float:
    """Seconds, read when all that was asked of a device is done.

    On one thread of a processor these are the thread's own seconds, in which other programs' turns do not count.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes that the keys and values of a prompt take; attention that is gone keeps none."""
    cache = model(input_ids=_prompt(model, length), use_cache=True, **_last_logits(model)).past_key_values
    kept = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in kept)


def _length(model: PreTrainedModel, length: int) -> int:
    return min(length, getattr(model.config, "max_position_embeddings", None) or length)


def _prompt(model: PreTrainedModel, length: int) -> Int[Tensor, "1 length"]:
    ids: Tensor = torch.arange(length)[None] % model.config.vocab_size
    return ids.to(model.device)


def _last_logits(model: PreTrainedModel) -> dict[str, Any]:
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
