"""Two processes on two cores against one process on one core: the same prune, the wall time of the pruning alone.

A random Llama, since only the time counts; each process has one thread. What the machine allows is measured beside
it: two runs that know nothing of each other, at the same time. `python -m benchmarks processes`.
"""

import json
import os
import socket
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch

from prunelm.data import Batches, sequences_at_once
from prunelm.distributed import launched, together
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.testing import tiny_model

from .record import measure

SIZES = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}
LENGTH, ROUNDS = 512, 3
RECIPES = {
    "two-step refit": ("goa-budget", 48),
    "repair": ("obs", 48),
    "repair, usual text": ("obs", 128),
}
"""Recipes and how many sequences they calibrate on."""
ARRANGEMENTS = {"one": (1, 1), "two": (2, 1), "apart": (1, 2)}
"""How many processes make one run, and how many runs go at the same time."""


def main() -> None:
    """All recipes; each is measured once and kept."""
    for name, (recipe, samples) in RECIPES.items():
        measure("processes", name, lambda r=recipe, s=samples: compared(r, s))


def compared(recipe: str, samples: int) -> dict[str, Any]:
    """Seconds of one process, of two, and of two apart, taking turns; ratios of their medians."""
    wall: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    computing: dict[str, list[float]] = {name: [] for name in ARRANGEMENTS}
    for _ in range(ROUNDS):
        for name, (count, copies) in ARRANGEMENTS.items():
            seconds, busy = _timed(recipe, samples, count, copies)
            wall[name].append(seconds)
            computing[name].append(busy)
    one, two, apart = (median(found) for found in wall.values())
    return {
        "recipe": recipe,
        "tokens": samples * LENGTH,
        **wall,
        "speedup": one / two,
        "speedup in computing time": median(computing["one"]) / median(computing["two"]),
        "two apart": 2 * one / apart,
    }


def _timed(recipe: str, samples: int, count: int, copies: int) -> tuple[float, float]:
    """Seconds of the slowest of some runs at the same time, and those that the busiest of their processes computed."""
    runs = [process for _ in range(copies) for process in _started(recipe, samples, count)]
    said = [json.loads(run.communicate()[0].splitlines()[-1]) for run in runs]
    return max(one["wall"] for one in said), max(one["computing"] for one in said)


def _started(recipe: str, samples: int, count: int) -> list[subprocess.Popen[str]]:
    """The processes of one run."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.processes", recipe, str(samples)],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def _prune(recipe: str, samples: int) -> None:
    torch.set_num_threads(1)
    model = tiny_model("llama", **SIZES)
    ids = torch.randint(SIZES["vocab_size"], (samples, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = Batches(
        batches=[{"input_ids": part} for part in ids.split(sequences_at_once(LENGTH))],
        facts={"tokens": ids.numel(), "sequences": samples},
    )
    start, busy = time.perf_counter(), time.process_time()
    prune_(model, batches, Recipe.load(recipe, sparsity=0.3))
    print(json.dumps({"wall": time.perf_counter() - start, "computing": time.process_time() - busy}))


if __name__ == "__main__":
    if launched() > 1:
        with together():
            _prune(sys.argv[1], int(sys.argv[2]))
    else:
        _prune(sys.argv[1], int(sys.argv[2]))
