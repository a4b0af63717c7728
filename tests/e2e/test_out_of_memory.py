"""Memory that runs out is answered with smaller batches where there are any, and else with one line."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunelm import checkpoint
from prunelm.errors import CheckpointError
from prunelm.testing import tiny_model

PROVE = checkpoint.prove_folder
SMALL = ("--samples", "8", "--length", "32")


@pytest.fixture(autouse=True)
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written folders are not opened in a fresh process, which is tested elsewhere and slow."""
    monkeypatch.setattr("prunelm.checkpoint.prove_folder", lambda *_: 0.0)


@pytest.fixture
def runs_out(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """A function (name, times) that makes a function of ours run out of memory so many times."""

    def make(name: str, times: int) -> None:
        module, _, function = name.rpartition(".")
        whole, left = getattr(__import__(module, fromlist=[function]), function), [times]

        def failing(*args: Any, **options: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it.")
            return whole(*args, **options)

        monkeypatch.setattr(name, failing)

    return make


@pytest.mark.parametrize("command", ["prune", "repair"])
def test_smaller_batches_once(
    command: str,
    cli: Callable[..., Any],
    per_block: Path,
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    runs_out: Callable[[str, int], None],
) -> None:
    dense, out = tiny_folder("llama"), tmp_path / "out"
    if command == "prune":
        runs_out("prunelm.workflow.several_sizes.prune_family", 1)
        ran = cli(command, dense, out, "--text", text_file, "--sparsity", "0.2,0.3", "--recipe", "obs", *SMALL)
    else:
        runs_out("prunelm.workflow.repairing.repair_", 1)
        ran = cli(command, dense, per_block, out, "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    said = "cpu: memory ran out with batches of 1,024 tokens; begun anew with one sequence of 32"
    for folder in [out / "0.2", out / "0.3"] if command == "prune" else [out]:
        assert said in json.loads((folder / "pruning.json").read_text())["notes"]


def test_where_nothing_is_smaller_it_is_one_line(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    runs_out: Callable[[str, int], None],
) -> None:
    runs_out("prunelm.evaluation.score_windows", 9)
    ran = cli("evaluate", tiny_folder("llama"), "--text", text_file, "--length", "32")
    assert ran.code == 1
    line = re.compile(
        r"error: memory ran out \(CUDA out of memory\. Tried to allocate 2\.00 GiB\); this process has had up to "
        r"[\d,]+ bytes of main memory, and on \S+ [\d,]+ of [\d,]+ bytes are free\. Use a smaller --length, or another "
        r"--device\."
    )
    assert line.fullmatch(ran.err.splitlines()[-1]), ran


@pytest.mark.parametrize(
    ("ended", "says"),
    [
        (
            "kill -KILL $$",
            r"SIGKILL ended it, as the system does where memory runs out \([\d,]+ of [\d,]+ bytes are free\)",
        ),
        ("kill -SEGV $$", r"SIGSEGV ended it"),
        ("exit 1", r"no message"),
        ("echo Error: once >&2; echo Error: why >&2; exit 1", r"Error: why"),
    ],
)
def test_a_proof_that_ended_says_what_ended_it(
    ended: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        checkpoint, "verified", lambda *_, **__: subprocess.run(["sh", "-c", ended], capture_output=True, text=True)
    )
    with pytest.raises(CheckpointError, match=rf"did not prove itself in a fresh process: {says}$"):
        PROVE(tiny_model("llama"), tmp_path)
