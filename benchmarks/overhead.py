"""How long pruning takes, how much memory, and what it gives back in speed: ratios measured in one run.

SmolLM2-135M-Instruct from its PyPI package, 32 x 512 tokens of Python's language reference; no other data is needed.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from prunelm.data import Batches, sample_batches, sequences_at_once
from prunelm.demo import language_reference, model_file
from prunelm.loading import find_model, load_model, load_tokenizer
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.speed import prefill_speed
from prunelm.stream import attention_implementation

from .record import machine, measure
from .stages import plain_pass

LENGTH, SAMPLES, SPARSITY = 512, 32, 0.3


def times() -> None:
    """What needs a quiet machine: wall time and speed."""
    measure("overhead", "time", wall_time)
    measure("overhead", "speed", prefill)


def main() -> None:
    """All parts; each is measured once and kept."""
    times()
    measure("overhead", "memory of SmolLM2-135M", lambda: memory(None))
    measure("overhead", "memory of a 0.8B Llama", lambda: memory({"hidden_size": 1536, "intermediate_size": 6144}))


def _calibration(model: PreTrainedModel) -> Batches:
    tokenizer = load_tokenizer(find_model(model_file(), device="cpu"))
    text = list(language_reference())
    return sample_batches(text, tokenizer, model.config, samples=SAMPLES, length=LENGTH, seed=0, causal=True)


def wall_time() -> dict[str, Any]:
    """Whole prunes against plain forward passes over the same tokens, in turns; loading and saving apart."""
    source = find_model(model_file(), device="cpu")
    dense = load_model(source)
    calibration = _calibration(dense)
    dense(**calibration.batches[0])
    forwards = [plain_pass(dense, calibration, time.perf_counter)]
    found: dict[str, Any] = {"tokens": calibration.tokens}
    for label, changes in (("without refit", {"reconstruction": "none"}), ("with two-step refit", {})):
        model = load_model(source)
        start = time.perf_counter()
        prune_(model, calibration, Recipe.load("goa-budget", sparsity=SPARSITY, **changes))
        seconds = time.perf_counter() - start
        forwards.append(plain_pass(dense, calibration, time.perf_counter))
        found[label] = {"seconds": seconds, "forward passes": seconds / (sum(forwards[-2:]) / 2)}
    return {**found, "forward seconds": forwards}


def prefill() -> dict[str, Any]:
    """Prefill tokens per second at 30 %, batch 1, 512 tokens, dense and pruned in turns, against removed FLOPs."""
    source = find_model(model_file(), device="cpu")
    dense, pruned = load_model(source), load_model(source)
    empty = Batches(batches=[], facts={"tokens": 0, "sequences": 0})
    prune_(pruned, empty, Recipe.load("l2", sparsity=SPARSITY))
    before, after = prefill_speed([dense, pruned], length=LENGTH, rounds=25)
    found = {"dense tokens/s": before, "pruned tokens/s": after, "speedup": after / before}
    for label, count in (("FLOPs", _flops), ("causal FLOPs", _causal_flops)):
        promised = count(dense) / count(pruned)
        found |= {f"promised by {label}": promised, f"share by {label}": (after / before - 1) / (promised - 1)}
    return found


@torch.no_grad()
def _flops(model: PreTrainedModel) -> float:
    """Floating-point operations of a prompt by PyTorch's own counter, the head for the last token only.

    Attention is counted in its eager form, over the whole prompt for every token: the counter misses the fused kernel.
    """
    ids = torch.arange(LENGTH)[None]
    with attention_implementation(model, "eager"), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, logits_to_keep=1)
    return float(counter.get_total_flops())


def _causal_flops(model: PreTrainedModel) -> float:
    """The same, with attention over half the prompt, as a causal kernel that skips the other half computes it."""
    config = model.config
    skipped = config.num_hidden_layers * config.num_attention_heads * config.head_dim * LENGTH * LENGTH
    return _flops(model) - 2 * skipped


def memory(sizes: dict[str, int] | None) -> dict[str, Any]:
    """Peak resident memory of a prune with refit in a process of its own, against the float32 weights."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        if sizes is None:
            load_model(find_model(model_file(), device="cpu")).save_pretrained(folder)
        else:
            config = LlamaConfig(
                **sizes, num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=8, vocab_size=8192
            )
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        samples = 16 if sizes is None else 4
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.overhead", str(folder), str(samples)],
            capture_output=True,
            text=True,
            check=True,
        )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def _measure_memory(folder: str, samples: int) -> dict[str, Any]:
    libraries = peak_memory()
    model = load_model(find_model(folder, device="cpu"))
    channels = [site.consumer.layer.in_features for site in find_sites(model)[:2]]
    weights = sum(p.numel() * 4 for p in model.parameters())
    ids = torch.randint(model.config.vocab_size, (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = Batches(
        batches=[{"input_ids": b} for b in ids.split(sequences_at_once(LENGTH))],
        facts={"tokens": ids.numel(), "sequences": samples},
    )
    prune_(model, batches, Recipe.load("goa-budget", sparsity=SPARSITY))
    hidden = model.config.hidden_size
    # Per site: a Gram matrix and a cross moment in float64, for the producers' input and for the consumer's.
    statistics = sum(8 * (hidden * hidden * 2 + c * c + c * hidden) for c in channels)
    peak = peak_memory()
    return {
        "tokens": ids.numel(),
        "float32 weights": weights,
        "one block's statistics": statistics,
        "libraries": libraries,
        "peak": peak,
        "ratio": (peak - statistics) / weights,
        "ratio without libraries": (peak - libraries - statistics) / weights,
        "process": machine(),
    }


def peak_memory() -> int:
    """Peak resident bytes of this process so far; unlike ru_maxrss, a parent's peak is not inherited."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure_memory(sys.argv[1], int(sys.argv[2]))))
