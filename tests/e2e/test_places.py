"""Where results go: whole or not at all, by one process at a time, whatever becomes of the disk or the reader."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import forked

from prunelm.commands.console import print_json
from prunelm.errors import OutputError
from prunelm.locking import locked
from prunelm.writing import claimed, new_folder, write_whole

L1 = ("--recipe", "l1", "--sparsity", "0.3")
HOLDER = """
import sys, time
from prunelm.locking import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the lock of OUT; killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "out"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_runs_into_one_folder(
    holder: Any, cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = tiny_folder("llama")
    for command in (
        ("prune", model, tmp_path / "out", *L1),
        ("calibrate", model, tmp_path / "out", "--text", text_file),
        ("export", model, tmp_path / "out"),
        ("evaluate", model, "--text", text_file, "--out", tmp_path / "out"),
    ):
        ran = cli(*command)
        assert ran.code == 1, command
        assert f"out is being written by process {holder.pid} on " in ran.err.splitlines()[-1]
    holder.kill()
    holder.wait()
    assert cli("prune", model, tmp_path / "out", *L1).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_is_held_once_and_by_one_thread_again(tmp_path: Path) -> None:
    with locked(tmp_path / "a"), locked(tmp_path / "a"), locked(tmp_path / "b"):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.lock", ".b.lock"]
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half.txt").write_text("half")
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "precious.txt").write_text("mine")
    (tmp_path / ".out.lock").write_text("{")
    with claimed(out):
        assert (out / "precious.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / ".out.old").mkdir()
    with new_folder(out, force=True) as partial:
        (partial / "new.txt").write_text("new")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new.txt"]


def test_a_text_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    write_whole(target, "old")
    target.chmod(0o600)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"page\.html: cannot be written: the disk is full"):
            write_whole(target, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write_whole(target, "new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_args: Any, **_kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prunelm.locking.os.open", denied)
    with pytest.raises(OutputError, match=r"out: cannot be written: Permission denied\.") as refused:
        write_whole(tmp_path / "out", "text")
    assert refused.value.__notes__ == ["Nothing was left behind."]
    with pytest.raises(OutputError, match=r"out: cannot be written: Permission denied"), new_folder(tmp_path / "out"):
        raise AssertionError("it began to write")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_output_that_cannot_be_written(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/dev/full")
    ran = forked.start(tmp_path, "-m", "prunelm", "inspect", str(tiny_folder("llama")))
    assert ran.wait() == 1
    assert ran.err == "error: the output cannot be written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_data_that_is_printed_has_gone_out() -> None:
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115 - closing it fails too
    with contextlib.redirect_stdout(full), pytest.raises(OSError, match="No space left"):
        print_json({"n": 1})
    with contextlib.suppress(OSError):
        full.close()


def test_a_journal_is_on_the_disk_when_its_process_is_killed(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path, tmp_path_factory: Any
) -> None:
    out = tmp_path / "evaluation.json"
    command = ["evaluate", tiny_folder("llama"), "--text", text_file, "--length", "8", "--max-tokens", "3200"]
    command += ["--out", out]
    process = forked.start(tmp_path_factory.mktemp("heard"), "-m", "prunelm", *map(str, command))
    end = time.monotonic() + 120
    while not (found := list(tmp_path.glob(".*.journal"))) or len(found[0].read_bytes().splitlines()) < 4:
        assert process.code is None, process.err
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = found[0].read_bytes()
    assert cli(*command).code == 0
    assert before
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert json.loads(out.read_text())["parts"]["quality"]["results"]["predicted"] > 0


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    real, out = tmp_path / "real", tmp_path / "out"
    real.mkdir()
    (real / "kept").touch()
    out.symlink_to(real)
    with new_folder(out, force=True) as partial:
        (partial / "new").touch()
    assert not out.is_symlink()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["kept", "new", "out", "real"]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_what_cannot_be_renamed_is_refused_at_once(
    name: str, cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = cli("prune", tiny_folder("llama"), name, *L1, "--force")
    assert ran.code == 1
    assert f"{name} cannot be replaced as a whole. Name a folder in it." in ran.err
    assert list(tmp_path.iterdir()) == []
