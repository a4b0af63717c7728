"""Two processes on two cores against one process on one core: the same prune, the wall time of the pruning alone.

A random Llama, since only the time counts; each process has one thread. `python -m benchmarks processes`.
"""

import json
import os
import socket
import subprocess
import sys
import time
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
SAMPLES, LENGTH, ROUNDS = 48, 512, 3
RECIPES = {"two-step refit": "goa-budget", "repair": "obs"}


def main() -> None:
    """Both recipes; each is measured once and kept."""
    for name, recipe in RECIPES.items():
        measure("processes", name, lambda recipe=recipe: compared(recipe))


def compared(recipe: str) -> dict[str, Any]:
    """Seconds of one process and of two, taking turns; the ratio of their medians."""
    wall: dict[int, list[float]] = {1: [], 2: []}
    computing: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(ROUNDS):
        for count in wall:
            seconds, busy = _timed(recipe, count)
            wall[count].append(seconds)
            computing[count].append(busy)
    one, two = (_median(found) for found in wall.values())
    busy_one, busy_two = (_median(found) for found in computing.values())
    return {
        "recipe": recipe,
        "tokens": SAMPLES * LENGTH,
        "one": wall[1],
        "two": wall[2],
        "speedup": one / two,
        "speedup in computing time": busy_one / busy_two,
    }


def _median(found: list[float]) -> float:
    return sorted(found)[len(found) // 2]


def _timed(recipe: str, count: int) -> tuple[float, float]:
    """Seconds of one prune by so many processes, as the first saw it, and those that the busiest computed."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.processes", recipe],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    said = [json.loads(run.communicate()[0].splitlines()[-1]) for run in runs]
    return said[0]["wall"], max(one["computing"] for one in said)


def _prune(recipe: str) -> None:
    torch.set_num_threads(1)
    model = tiny_model("llama", **SIZES)
    ids = torch.randint(SIZES["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = Batches(
        batches=[{"input_ids": part} for part in ids.split(sequences_at_once(LENGTH))],
        facts={"tokens": ids.numel(), "sequences": SAMPLES},
    )
    start, busy = time.perf_counter(), time.process_time()
    prune_(model, batches, Recipe.load(recipe, sparsity=0.3))
    print(json.dumps({"wall": time.perf_counter() - start, "computing": time.process_time() - busy}))


if __name__ == "__main__":
    if launched() > 1:
        with together():
            _prune(sys.argv[1])
    else:
        _prune(sys.argv[1])
