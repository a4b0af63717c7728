"""A Llama in the shape of 7B (random bfloat16 weights) on a GPU: time, memory, and where the time goes.

Recipe `best` without its search, 128 x 2,048 tokens, in memory and streamed from disk; and the order of `obs` alone, up
to 14,336 channels. Random weights say nothing of quality: this is about cost.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from prunelm import prune
from prunelm.data import Batches
from prunelm.demo import language_reference
from prunelm.elimination import eliminate
from prunelm.memory import batch_tokens_on
from prunelm.pruning import prune_
from prunelm.recipe import Recipe

from .record import device, measure
from .streaming import save_byte_tokenizer

PRODUCTS = ("gemm", "gemv", "cutlass", "sm90", "sm80", "potrf", "trsm", "syrk", "flash", "fmha", "dot_kernel")
"""Parts of the names of GPU kernels that multiply matrices, or factor them."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model and of the calibration."""

    blocks: int = 32
    hidden: int = 4096
    ffn: int = 11008
    heads: int = 32
    vocabulary: int = 32_000
    sequences: int = 128
    length: int = 2048
    order: tuple[int, ...] = (1536, 11008, 14336)


def main() -> None:
    """Every cell that is not measured yet; nothing without a GPU."""
    if not device().startswith("cuda"):
        print("skipped: the large model needs --device cuda")
        return
    shape = Shape()
    for n in shape.order:
        measure("large", f"order of {n} channels", lambda n=n: order_time(n, shape.hidden, device()))
    measure("large", "prune", lambda: prune_time(shape, device()))
    measure("large", "prune, streamed", lambda: streamed_time(shape, device()))
    # The profiler slows things down, and every block does the same.
    measure("large", "profile of 2 blocks", lambda: profiled(replace(shape, blocks=2), device()))


def order_time(n: int, outputs: int, where: str) -> dict[str, Any]:
    """Seconds that the order of n single channels takes, from random moments of 2n tokens."""
    generator = torch.Generator(where).manual_seed(0)
    x = torch.randn(2 * n, n, generator=generator, device=where)
    second, weight = (x.T @ x / (2 * n)).double(), torch.randn(outputs, n, generator=generator, device=where)
    start = _now(where)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    _, costs = eliminate(weight, inverse, torch.arange(n)[:, None])
    return {"channels": n, "seconds": _now(where) - start, "least_cost": float(costs.min())}


def prune_time(shape: Shape, where: str) -> dict[str, Any]:
    """Seconds of a plain forward pass and of the prune, and the most memory that it took."""
    model, batches = built(shape, where)
    forward = _forward_time(model, batches, where)
    if where.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    start = _now(where)
    report = prune_(model, batches, recipe_of(shape))
    found = {"forward": forward, "seconds": _now(where) - start, "parameters": report.parameters_before}
    if where.startswith("cuda"):
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return {**found, "shape": vars(shape), "after": report.parameters_after}


def streamed_time(shape: Shape, where: str) -> dict[str, Any]:
    """Seconds of the same prune streamed from a folder into another, its proof included, and the most GPU memory.

    The text is Python's language reference, a byte a token, so that reading it takes no time.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder, text = Path(scratch) / "dense", Path(scratch) / "text.txt"
        built(shape, where)[0].save_pretrained(folder, max_shard_size="1GB")
        save_byte_tokenizer(folder)
        text.write_text("\n\n".join(language_reference())[: 2 * shape.sequences * shape.length], encoding="utf-8")
        if where.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        options: dict[str, Any] = {"recipe": recipe_of(shape), "text": text, "device": where}
        start = _now(where)
        report = prune(folder, Path(scratch) / "out", stream=True, compute_dtype="bfloat16", **options)
        found = {"seconds": _now(where) - start, "after": report.parameters_after, "shape": vars(shape)}
    if where.startswith("cuda"):
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def profiled(shape: Shape, where: str) -> dict[str, Any]:
    """The share of the device's busy time in matrix products and factorizations."""
    model, batches = built(shape, where)
    cuda = where.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        start = _now(where)
        prune_(model, batches, recipe_of(shape))
        seconds = _now(where) - start
    spent = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e6 for e in seen.key_averages()}
    busy = sum(spent.values())
    products = sum(value for key, value in spent.items() if any(part in key.lower() for part in PRODUCTS))
    longest = sorted(spent.items(), key=lambda item: -item[1])[:12]
    return {"seconds": seconds, "busy": busy, "products": products, "longest": [[key[:80], t] for key, t in longest]}


def built(shape: Shape, where: str) -> tuple[PreTrainedModel, Batches]:
    """The model on its device, and random tokens beside it."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device(where):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    at_once = batch_tokens_on(torch.device(where))
    each = max(1, at_once // shape.length)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(shape.vocabulary, (shape.sequences, shape.length), generator=generator).to(where)
    facts = {"tokens": ids.numel(), "sequences": shape.sequences, "source": "random tokens"}
    return model, Batches(batches=[{"input_ids": part} for part in ids.split(each)], facts=facts, batch_tokens=at_once)


def recipe_of(shape: Shape) -> Recipe:
    """`best` without its search."""
    return Recipe.load("best", sparsity=0.3, rounds=0, natural_steps=0, samples=shape.sequences, length=shape.length)


@torch.no_grad()
def _forward_time(model: PreTrainedModel, batches: Batches, where: str) -> float:
    model(**batches.batches[0])
    start = _now(where)
    for batch in batches.batches:
        model(**batch)
    return _now(where) - start


def _now(where: str) -> float:
    if where.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
