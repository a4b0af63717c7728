"""The same kinds of damaged files, chosen by atheris: what reaches untried branches of our code is kept and varied.

`python -m benchmarks guided`, where atheris is installed (`pip install atheris`). The files are those that hypothesis
makes, from bytes that libFuzzer changes. Each kind has a process of its own, which libFuzzer ends.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .record import measure

COUNT = 10_000
SEED = 1


def main() -> None:
    """All kinds; each is measured once and kept."""
    from . import fuzz

    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris is not installed (pip install atheris)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        names = list(fuzz.kinds(Path(scratch)))
    for name in names:
        measure("guided", name, lambda name=name: campaign(name, COUNT))


def campaign(name: str, count: int) -> dict[str, Any]:
    """What becomes of so many files of a kind, in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "found.json"
        command = [sys.executable, "-m", "benchmarks.guided", name, str(count), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if not out.exists():
            raise RuntimeError(f"{name}: ended early (exit code {done.returncode}): {done.stderr[-2000:]}")
        return dict(json.loads(out.read_text()))


def _guided(name: str, count: int, out: Path) -> None:
    """Read files until there were so many; does not come back."""
    import atheris

    with atheris.instrument_imports(include=["prunelm"]):
        from . import fuzz
    with tempfile.TemporaryDirectory() as scratch:
        kind = fuzz.kinds(Path(scratch))[name]
        kind.read(kind.whole)
        found = fuzz.Found()
        one = fuzz.reading(kind, found, count).hypothesis.fuzz_one_input

        def test(raw: bytes) -> None:
            if found.files < count:
                one(raw)
            else:
                out.write_text(json.dumps(vars(found)))
                os._exit(0)  # libFuzzer calls any other end a crash

        with fuzz.bounded():
            atheris.Setup([name, f"-seed={SEED}", "-max_len=4096", "-print_final_stats=0"], test)
            atheris.Fuzz()


if __name__ == "__main__":
    _guided(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
