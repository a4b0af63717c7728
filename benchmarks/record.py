"""Results as JSON: one file a benchmark, one entry a cell, so that an interrupted run goes on where it stopped.

Several processes may measure together: each claims a cell before it runs it, in a folder that they share.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"
DATA = Path(os.environ.get("PRUNELM_SHARED", Path(__file__).parents[2] / "shared")) / "data"


DEVICE, TOGETHER = "PRUNELM_BENCHMARK_DEVICE", "PRUNELM_BENCHMARK_FOLDER"
"""Environment of a run: where models compute, and the folder that processes which measure together share."""


def device() -> str:
    """Where models compute."""
    return os.environ.get(DEVICE, "cpu")


def shared_folder() -> Path | None:
    """The folder of processes that measure together; None where one measures alone."""
    return Path(os.environ[TOGETHER]) if TOGETHER in os.environ else None


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """While open, no other of the processes that measure together is in here."""
    folder = shared_folder()
    if folder is None:
        yield
        return
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _claimed(name: str, cell: str) -> bool:
    """Whether this process is the first to ask for a cell."""
    folder = shared_folder()
    if folder is None:
        return True
    try:
        (folder / hashlib.sha256(f"{name} {cell}".encode()).hexdigest()).mkdir()
    except FileExistsError:
        return False
    return True


def machine() -> dict[str, Any]:
    """Where and with what something was measured."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "device": torch.cuda.get_device_name() if device().startswith("cuda") else "cpu",
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
    if cell in read(name) or not _claimed(name, cell):
        return
    print(f"{name}: {cell}", flush=True)
    made = {**run(), "machine": machine()}
    with one_at_a_time():
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
