"""Results as JSON: one file a benchmark, one entry a cell, so that an interrupted run goes on where it stopped."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("PRUNELM_SHARED", Path(__file__).parents[2] / "shared")) / "data"


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read(name: str) -> dict[str, Any]:
    """The entries measured so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def measure(name: str, cell: str, run: Callable[[], dict[str, Any]]) -> None:
    """Run a cell unless it has been measured, and save it at once."""
    if cell in read(name):
        return
    print(f"{name}: {cell}", flush=True)
    made = {**run(), "machine": machine()}
    entries = {**read(name), cell: made}
    RESULTS.mkdir(exist_ok=True)
    partial = RESULTS / f".{name}.partial"
    partial.write_text(json.dumps(entries, indent=1) + "\n")
    partial.replace(RESULTS / f"{name}.json")


def needed(*paths: Path) -> bool:
    """Whether the benchmark data are here; says so where they are not."""
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        print(f"skipped: {', '.join(missing)} not found; these benchmarks need data that does not come with PruneLM")
    return not missing
