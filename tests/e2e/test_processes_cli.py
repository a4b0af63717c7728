"""`torchrun ... -m prunelm prune`: one result, one voice, and a lost process ends the run in one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--samples", "24", "--length", "32", "--sparsity", "0.3", "--multiple-of", "1")


def started(count: int, *words: object) -> list[subprocess.Popen[str]]:
    """So many processes of one run, as `torchrun` starts them."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "prunelm", *map(str, words)],
            env={**os.environ, **shared, "RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def ended(runs: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each process."""
    heard = [run.communicate(timeout=240) for run in runs]
    return [(run.returncode, out, err) for run, (out, err) in zip(runs, heard, strict=True)]


@pytest.mark.long
def test_torchrun(cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    options = (tiny_folder("llama"), "--text", text_file, *SMALL, "--recipe", "goa-budget")
    assert cli("prune", *options[:1], tmp_path / "one", *options[1:]).code == 0
    words = ["prune", options[0], tmp_path / "two", *options[1:], "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prunelm"]
    ran = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, check=False, timeout=240)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["notes"] == ["2 processes shared the calibration batches"]
    one, two = (json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("one", "two"))
    assert {key: site["kept"] for key, site in one["sites"].items()} == {k: s["kept"] for k, s in two["sites"].items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [(), ("--stream",)])
def test_a_lost_process_and_the_run_that_goes_on(
    stream: tuple[str, ...], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "long.txt", tmp_path / "out"
    text.write_text(text_file.read_text() * 10)
    words = (
        "prune",
        tiny_folder("llama"),
        out,
        "--text",
        text,
        "--samples",
        "3000",
        "--length",
        "64",
        *SMALL[4:],
        *stream,
    )
    runs = started(2, *words)
    end = time.monotonic() + 120
    while not list(tmp_path.glob(".out.work/*/block-0.*")):
        assert all(run.poll() is None for run in runs), ended(runs)
        assert time.monotonic() < end
        time.sleep(0.01)
    runs[1].send_signal(signal.SIGKILL)
    (code, said, complained), (killed, *_) = ended(runs)
    assert (code, said, killed) == (1, "", -signal.SIGKILL)
    (line,) = [line for line in complained.splitlines() if not line.startswith(("recipe: ", "streaming: "))]
    assert line.startswith("error: another process of this run was lost (")
    assert f"prunelm prune --resume {out}" in line
    assert not out.exists()
    assert [run[0] for run in ended(started(2, "prune", "--resume", out))] == [0, 0]
    assert list(out.glob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long.txt", "out"]


def test_what_is_not_shared_is_left_to_the_first(tiny_folder: Callable[..., Path]) -> None:
    first, second = ended(started(2, "inspect", tiny_folder("llama"), "--json"))
    assert first[0] == second[0] == 0
    assert json.loads(first[1])["model_type"] == "llama"
    assert second[1:] == ("", "")


def test_what_is_wrong_is_said_once(tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    first, second = ended(started(2, "prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL))
    assert (first[0], second[0]) == (1, 1)
    (line,) = [line for line in first[2].splitlines() if not line.startswith("recipe: ")]
    assert line.startswith(f"error: {tmp_path / 'out'} exists. ")
    assert second[1:] == ("", "")
