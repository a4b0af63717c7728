"""What machines do to runs: kills at any moment, signals, full and read-only disks, lost processes, damaged files.

`python -m benchmarks faults` kills 100 runs with SIGKILL at seeded moments and lets each go on: the result must be that
of an uninterrupted run, byte for byte, with nothing left beside it. Then every other fault once, with the line that it
is answered by. Runs are forked from one process that has imported the libraries; the proof of folders in a fresh
process is left out. Evaluations are compared without the seconds that they took.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import prunelm.checkpoint
import prunelm.export_files
from prunelm.testing import tiny_model

from .record import measure
from .running import Ended, Run
from .streaming import save_byte_tokenizer

KILLS = 25
"""Of each command."""
KILL = "kill -9, "
SEED = 7
MOST_ENDED = 5
"""Runs that may end before they are killed, for each that is."""
SMALL = ("--length", "32", "--samples", "24")
SIZE = ("--sparsity", "0.3", "--multiple-of", "1")
COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "MODEL", "OUT", "--recipe", "goa-budget", "--text", "TEXT", *SMALL, *SIZE),
    "calibrate": ("calibrate", "MODEL", "OUT", "--recipe", "sensitivity", "--text", "TEXT", *SMALL),
    "search": ("prune", "MODEL", "OUT", "--recipe", "best", "--text", "TEXT", *SMALL, *SIZE),
    "streamed": ("prune", "MODEL", "OUT", "--recipe", "obs", "--stream", "--text", "TEXT", *SMALL, *SIZE),
    "several sizes": ("prune", "MODEL", "OUT", "--recipe", "obs", "--text", "TEXT", *SMALL, "--sparsity", "0.2,0.4"),
    "evaluate": ("evaluate", "MODEL", "--text", "TEXT", "--length", "32", "--max-tokens", "3200", "--out", "OUT"),
    "export": ("export", "MODEL", "OUT", "--format", "gguf", "--type", "f32"),
}
AGAIN = ("evaluate", "export")
"""Commands that go on when they are given again."""
LEFT_OUT = {"seconds"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder with a model and a text, and room for runs."""

    scratch: Path
    model: Path
    text: Path

    def words(self, command: str, out: Path) -> list[str]:
        """A command with its places filled in."""
        names = {"MODEL": str(self.model), "TEXT": str(self.text), "OUT": str(out)}
        return [names.get(word, word) for word in COMMANDS[command]]

    def run(self, *words: object, **options: Any) -> Run:
        """A command, begun."""
        return Run(*words, log=self.scratch / f"{time.monotonic_ns()}.log", **options)


@dataclass(kw_only=True)
class Kills:
    """What became of the kills of one command."""

    kills: int = 0
    ended_before: int = 0
    resumed: int = 0
    identical: int = 0
    orphans: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """All faults; each kind is measured once and kept."""
    with tempfile.TemporaryDirectory() as scratch, unproven():
        place = prepared(Path(scratch))
        for n, command in enumerate(COMMANDS):
            run = partial(killed, place, command, KILLS, SEED + n)
            measure("faults", f"{KILL}{command}", lambda run=run: vars(run()))
        for name, fault in FAULTS.items():
            measure("faults", name, partial(_anywhere, fault, place))


def _anywhere(fault: Callable[[Place], dict[str, Any]], place: Place) -> dict[str, Any]:
    """What a fault led to, without the folder that it happened in."""
    found = fault(place)
    here = re.escape(str(place.scratch))
    said = re.sub(rf"{here}/[^/ ]+/", "", found["said"])
    return {**found, "said": re.sub(rf"{here}/[^/ ]+", "DISK", said)}


def prepared(scratch: Path) -> Place:
    """A tiny model, its tokenizer and a text."""
    torch.set_num_threads(1)
    model = scratch / "model"
    tiny_model("llama", vocab_size=300, max_position_embeddings=128).save_pretrained(model)
    save_byte_tokenizer(model, [("t", "h")])  # GGUF has no place for one without
    chooser, text = random.Random(SEED), scratch / "text.txt"
    words = [
        "the",
        "river",
        "and",
        "a",
        "letter",
        "of",
        "winter",
        "under",
        "bright",
        "golden",
        "mountain",
        "paper",
        "was",
        "read",
    ]
    text.write_text(" ".join(chooser.choices(words, k=6000)), encoding="utf-8")
    return Place(scratch=scratch, model=model, text=text)


@contextlib.contextmanager
def unproven() -> Iterator[None]:
    """Folders are not loaded again in a fresh process, and an export keeps what it has from its first second on."""
    proof, minute = prunelm.checkpoint.prove_folder, prunelm.export_files.WORTH_KEEPING
    prunelm.checkpoint.prove_folder, prunelm.export_files.WORTH_KEEPING = lambda *_: 0.0, 0.0
    try:
        yield
    finally:
        prunelm.checkpoint.prove_folder, prunelm.export_files.WORTH_KEEPING = proof, minute


def killed(place: Place, command: str, count: int, seed: int) -> Kills:
    """Kill a command at so many seeded moments, and let each go on; those that ended before are done again."""
    found, chooser = Kills(), random.Random(seed)
    out = _room(place) / "out"
    first = place.run(*place.words(command, out))
    ended = first.wait()
    if ended.status:
        raise RuntimeError(f"{command}: {ended.line}")
    expected, seconds = digest(out), time.monotonic() - first.started
    while found.kills < count and found.ended_before < MOST_ENDED * count:
        out = _room(place) / "out"
        run = place.run(*place.words(command, out))
        time.sleep(chooser.random() * seconds)
        run.kill(signal.SIGKILL)
        if run.wait().status == 0:
            found.ended_before += 1
            continue
        found.kills += 1
        ended = gone_on(place, command, out)
        found.resumed += ended.status == 0
        found.failures += [ended.line] if ended.status else []
        found.identical += out.exists() and digest(out) == expected
        found.orphans += [path.name for path in out.parent.iterdir() if path != out]
        shutil.rmtree(out.parent)
    return found


def gone_on(place: Place, command: str, out: Path) -> Ended:
    """Finish what was killed: by --resume where there is something, else by the whole command again."""
    if command not in AGAIN:
        ended = place.run(COMMANDS[command][0], "--resume", out).wait()
        if ended.status == 0 or "there is no unfinished work" not in ended.line or out.exists():
            return ended if not out.exists() or "there is no unfinished work" not in ended.line else _done()
    ended = place.run(*place.words(command, out)).wait()
    return _done() if f"{out} exists" in ended.line else ended


def _done() -> Ended:
    return Ended(status=0, lines=[])


def _room(place: Place) -> Path:
    return Path(tempfile.mkdtemp(dir=place.scratch))


def digest(out: Path) -> str:
    """What a result holds, byte for byte; of an evaluation, without the seconds."""
    if out.is_file() and (raw := out.read_bytes()).startswith(b"{"):
        return json.dumps(_without(json.loads(raw)), sort_keys=True)
    if out.is_file():
        return hashlib.sha256(raw).hexdigest()
    files = sorted(path for path in out.rglob("*") if path.is_file())
    parts = [f"{path.relative_to(out)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _without(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without(value) for name, value in data.items() if name not in LEFT_OUT}
    return data


def _answer(ended: Ended, *, lost: bool, left: list[str]) -> dict[str, Any]:
    """What is said of a fault: its line, its status, whether anything was lost, and what was left behind."""
    return {"status": ended.status, "said": ended.line, "lines": len(ended.lines), "lost": lost, "left": left}


def _named(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ended_by(place: Place, number: signal.Signals) -> dict[str, Any]:
    """A signal in the middle of a prune that would replace a folder."""
    out = _room(place) / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    run = place.run(*place.words("search", out), "--force")
    run.until(lambda: list(out.parent.glob(".out.work/*/*.safetensors")))
    run.kill(number)
    ended = run.wait()
    return _answer(ended, lost=not (out / "precious.txt").exists(), left=[n for n in _named(out.parent) if n != "out"])


def file_too_large(place: Place) -> dict[str, Any]:
    """Weights that the disk, or a quota, does not take."""
    out = _room(place) / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    ended = place.run(*place.words("prune", out), "--force", largest_file=100_000).wait()
    return _answer(ended, lost=not (out / "precious.txt").exists(), left=[n for n in _named(out.parent) if n != "out"])


def disk_full(place: Place, size: str = "200k") -> dict[str, Any]:
    """A small disk that fills up while results are written; where none can be made, a quota on files."""
    with _mounted(_room(place), f"size={size}") as disk:
        if disk is None:
            return file_too_large(place)
        ended = place.run(*place.words("prune", disk / "out")).wait()
        return _answer(ended, lost=(disk / "out").exists(), left=_named(disk))


def read_only(place: Place) -> dict[str, Any]:
    """A disk that cannot be written to; where none can be made, a folder."""
    folder = _room(place)
    with _mounted(folder, "ro") as disk:
        if disk is None:
            folder.chmod(0o555)
        ended = place.run(*place.words("prune", folder / "out")).wait()
        return _answer(ended, lost=False, left=_named(folder))


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path | None]:
    """A disk in memory at a folder, or None where this user cannot have one."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], capture_output=True, check=True)


def process_lost(place: Place) -> dict[str, Any]:
    """One of two processes is killed; the run goes on afterwards."""
    out = _room(place) / "out"
    runs = _together(place, *place.words("search", out))
    runs[0].until(lambda: list(out.parent.glob(".out.work/*/*.safetensors")))
    runs[1].kill(signal.SIGKILL)
    ended, _ = (run.wait() for run in runs)
    again = [run.wait().status for run in _together(place, "prune", "--resume", out)]
    return _answer(ended, lost=again != [0, 0], left=[n for n in _named(out.parent) if n != "out"])


def _together(place: Place, *words: object) -> list[Run]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = str(opened.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [place.run(*words, environment={**shared, "RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]


def scratch_cut(place: Place) -> dict[str, Any]:
    """The file in which hidden states wait is cut short while it is in use."""
    out = _room(place) / "out"
    run = place.run(*place.words("prune", out), "--stream")
    met = run.until(lambda: list(out.parent.glob(".out.work/*/*block-0*")) and _scratch_of(out))
    run.kill(signal.SIGSTOP)
    for path in _scratch_of(out) if met else []:
        os.truncate(path, 0)
    run.kill(signal.SIGCONT)
    ended = run.wait()
    kept = [name for name in _named(out.parent) if name != "out"]
    again = gone_on(place, "prune", out)
    return _answer(ended, lost=again.status != 0, left=[name for name in kept if name != ".out.work"])


def _scratch_of(out: Path) -> list[Path]:
    from prunelm.scratch import FILE

    return list(out.parent.rglob(FILE))


def bit_of_finished_work(place: Place) -> dict[str, Any]:
    """One bit of a finished step is flipped before the run goes on: the step is made again."""
    whole = _room(place) / "out"
    place.run(*place.words("prune", whole)).wait()
    out = _room(place) / "out"
    run = place.run(*place.words("prune", out))
    run.until(lambda: list(out.parent.glob(".out.work/*/block-0*")))
    run.kill(signal.SIGKILL)
    run.wait()
    for path in out.parent.glob(".out.work/*/block-0*"):
        flip(path, path.stat().st_size // 2)
    ended = gone_on(place, "prune", out)
    return _answer(ended, lost=digest(out) != digest(whole), left=[n for n in _named(out.parent) if n != "out"])


def bit_of_a_calibration(place: Place) -> dict[str, Any]:
    """One bit of a saved calibration is flipped before it is used."""
    room = _room(place)
    place.run(*place.words("calibrate", room / "seen")).wait()
    flip(room / "seen" / "calibration.safetensors", -40)
    words = ["prune", place.model, room / "out", "--recipe", "sensitivity", "--text", place.text, *SMALL]
    ended = place.run(*words, "--sparsity", "0.3", "--calibrated", room / "seen").wait()
    return _answer(ended, lost=(room / "out").exists(), left=[n for n in _named(room) if n != "seen"])


def bit_of_the_model(place: Place) -> dict[str, Any]:
    """One bit of the dense weights is flipped between a kill and the resume."""
    out = _room(place) / "out"
    model = Path(shutil.copytree(place.model, out.parent / "model"))
    other = Place(scratch=place.scratch, model=model, text=place.text)
    run = other.run(*other.words("prune", out))
    run.until(lambda: list(out.parent.glob(".out.work/*/block-0*")))
    run.kill(signal.SIGKILL)
    run.wait()
    shard = model / "model.safetensors"
    flip(shard, shard.stat().st_size // 2)
    ended = other.run("prune", "--resume", out).wait()
    flip(shard, shard.stat().st_size // 2)
    again = gone_on(other, "prune", out)
    return _answer(ended, lost=again.status != 0, left=[n for n in _named(out.parent) if n not in ("out", "model")])


def flip(path: Path, at: int) -> None:
    """Flip one bit of a file, at a place counted from its end where negative."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


FAULTS: dict[str, Callable[[Place], dict[str, Any]]] = {
    "SIGTERM": lambda place: ended_by(place, signal.SIGTERM),
    "Ctrl-C": lambda place: ended_by(place, signal.SIGINT),
    "disk too small": partial(disk_full, size="160k"),
    "disk full": disk_full,
    "quota on the size of a file": file_too_large,
    "read-only output": read_only,
    "one of two processes killed": process_lost,
    "scratch file cut short": scratch_cut,
    "one bit of finished work": bit_of_finished_work,
    "one bit of a saved calibration": bit_of_a_calibration,
    "one bit of the dense weights": bit_of_the_model,
}
