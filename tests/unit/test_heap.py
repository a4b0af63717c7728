"""Freed memory goes back to the system where little may stay."""

import subprocess
import sys

import pytest

from prunelm import cli

PROGRAM = """
import sys
from prunelm.heap import return_large

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if sys.argv[1] == "told":
    return_large()
warm = bytearray(24 * 2**20)
del warm  # glibc learns from it to keep pieces of this size
between = []
for _ in range(3):
    large = []
    for _ in range(40):
        large.append(b"x" * (2 * 2**20))
        between.append(b"y" * 50_000)
    before = resident()
    del large
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how the C library of Linux keeps freed memory")
def test_large_pieces_go_back_at_once_when_told() -> None:
    freed = {}
    for how in ("told", "as usual"):
        run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        freed[how] = int(run.stdout)
    assert freed["told"] > 75 * 2**20 > 10 * freed["as usual"]


@pytest.mark.parametrize(("option", "told"), [("--stream", 1), ("--per-block", 0)])
def test_streamed_runs_say_so_before_anything_else(option, told, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "return_large", lambda: calls.append(option))
    monkeypatch.setattr(cli, "_run", lambda: None)
    monkeypatch.setattr(cli, "SIGNALS", [])
    monkeypatch.setattr("sys.argv", ["prunelm", "prune", "model", "out", option])
    cli.main()
    assert len(calls) == told
