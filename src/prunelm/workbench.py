"""Unfinished work on one output: what was asked, what it is made of, and which steps are done, in a folder beside it.

A long run keeps a folder `.NAME.work` beside its output NAME. Every finished step is one file that appears in one
rename and whose name carries the checksum of its content, so a kill at any moment leaves whole steps only, and a
damaged one is made again. The same work started again reads them in place of making them, and the folder goes when the
output stands.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from .differing import differences, in_words
from .distributed import agreed_bytes, agreed_data, is_writer, size
from .errors import ProcessError, ResumeError, comes_again
from .forms import check_form
from .journal import Journal, add_way_on, again
from .placement import deterministic
from .results import versions
from .writing import MADE, WORK, beside, drop_work, explained, identity, write_whole

FORMAT = 2
HEAD, INPUTS, SUM = "task.json", "inputs.json", "sum"
_HEAD_FORM = {
    "command": str,
    "task": {"recipe": dict, "sparsities": [float]},
    "force": bool,
    "threads": int,
    "deterministic": bool,
}
WORTH_KEEPING = 60.0
"""Seconds of work from which on an interrupt leaves it for later; a kill leaves it always."""
RESUMABLE = ("prune", "calibrate")
"""Commands that take --resume; others go on when they are given again."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a finished step found: plain data, and tensors by name."""

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


_GOING_ON = ContextVar("prunelm.going_on", default=False)


class Workbench:
    """The finished steps of some work, by name; without a folder nothing is kept.

    With `anew`, those of other inputs are dropped in place of being refused.
    """

    def __init__(self, folder: Path | None = None, *, anew: bool = False) -> None:
        self.folder, self.anew = folder, anew

    def get(self, name: str) -> Step | None:
        """A step that was finished before; None where it was not, or where its file is damaged."""
        raw = agreed_bytes(self._whole(name))
        if raw is None:
            return None
        tensors = load(raw)
        facts = json.loads(tensors.pop("facts").numpy().tobytes())
        return Step(facts=facts, tensors=tensors)

    def _whole(self, name: str) -> bytes | None:
        """The content of a step's file; a damaged one is removed."""
        for path in self._files(name):
            raw = path.read_bytes()
            if _digest(raw) == path.name.split(".")[1]:
                return raw
            path.unlink()
        return None

    def put(self, name: str, step: Step) -> None:
        """Keep a finished step.

        Raises:
            OutputError: it cannot be written.
        """
        if self.folder is None:
            return
        facts = torch.frombuffer(bytearray(json.dumps(step.facts).encode()), dtype=torch.uint8)
        whole = {key: value.detach().cpu().contiguous() for key, value in step.tensors.items()}
        raw = save({"facts": facts, **whole})
        write_whole(self.folder / f"{name}.{_digest(raw)}.safetensors", raw)

    def journal(self, name: str, *, after: float = 0.0) -> Journal:
        """A journal of many small steps that come one after the other; nothing is written in the first seconds."""
        return Journal(self.folder / f"{name}.jsonl" if self.folder is not None else None, after=after)

    def part(self, name: str) -> "Workbench":
        """The steps of one part of the work."""
        if self.folder is None:
            return self
        (self.folder / name).mkdir(exist_ok=True)
        return Workbench(self.folder / name, anew=self.anew)

    def drop(self, name: str) -> None:
        """Let the steps of one part go."""
        if self.folder is not None:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Raise unless the work was begun with the same inputs, or drop that of others; the first time, note them.

        Raises:
            ResumeError: says which of them differ.
            OutputError: they cannot be written.
        """
        if self.folder is None:
            return
        now, path = json.loads(json.dumps(inputs)), self.folder / INPUTS
        if self.anew and path.is_file() and (_is_damaged(path) or differences(_read(path), now)):
            for step in (path, *self._steps()):
                step.unlink()
        if not path.is_file():
            _write(path, now)
            return
        differ = differences(_read(path), now)
        if differ:
            raise ResumeError(
                f"{self.folder}: the unfinished work of other inputs: {in_words(differ)}. Put them back, or say "
                "--force with the whole command to begin anew."
            )

    @property
    def done(self) -> int:
        """How many steps are finished."""
        return len(self._steps())

    def _steps(self) -> list[Path]:
        if self.folder is None:
            return []
        return [path for kind in ("*.safetensors", "*.jsonl") for path in self.folder.rglob(kind)]

    def _files(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}.*.safetensors")) if self.folder is not None else []


@contextlib.contextmanager
def workbench(out: str | Path, task: Mapping[str, Any], *, command: str, force: bool = False) -> Iterator[Workbench]:
    """The workbench of some work on `out`, with what an earlier run of the same work has finished.

    It goes when the body ends well. It stays after an interrupt, or an error of disk, device or memory, where it has
    cost more than a minute; and what an earlier run left stays whatever happens to this one: its error may be of inputs
    that can be put back. Then, and after a kill, `--resume` goes on with it.

    Args:
        out: what is made.
        task: all that was asked, as plain data.
        command: that resumes it.
        force: drop the unfinished work of another task or of other inputs; within `going_on`, it was said before.

    Raises:
        ResumeError: `out` has the unfinished work of another task, or of another version; says what differs.
        OutputError: the folder cannot be written.
    """
    out = Path(out)
    if not is_writer():
        with deterministic(agreed_data(False)):
            yield Workbench()
        return
    bench, start = Workbench(place_of(out), anew=force and not _GOING_ON.get()), time.monotonic()
    assert bench.folder is not None
    head = _begun(bench, out, task, command, force)
    before, threads = bench.done, torch.get_num_threads()
    torch.set_num_threads(head["threads"])
    try:
        with deterministic(agreed_data(head["deterministic"])):
            yield bench
    except BaseException as error:
        worth = isinstance(error, ProcessError) or time.monotonic() - start >= WORTH_KEEPING
        if not bench.done or not (before or (worth and not comes_again(error))):
            forget(out)
        elif not isinstance(error, ResumeError):
            add_way_on(error, _way_on(command, out))
        raise
    finally:
        torch.set_num_threads(threads)
    forget(out)


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """While open, the work is that of an earlier run, asked for as it was then."""
    before = _GOING_ON.set(True)
    try:
        yield
    finally:
        _GOING_ON.reset(before)


def lasting(place: str | Path | None) -> str | None:
    """A path that means the same from another folder; hub names stay."""
    return None if place is None else str(Path(place).resolve()) if Path(place).exists() else str(place)


def place_of(out: Path) -> Path:
    """The folder of the unfinished work on `out`."""
    return beside(out, WORK)


def goes_on(out: str | Path) -> bool:
    """Whether the next work on `out` goes on with finished steps of an earlier run, or is refused as another."""
    bench = Workbench(place_of(Path(out)))
    return (place_of(Path(out)) / HEAD).is_file() and bench.done > 0


def unfinished(out: str | Path) -> dict[str, Any]:
    """What was asked of the unfinished work on `out`: its `command`, `task`, `force`, and whether it `stands` by now.

    Raises:
        CheckpointError: its head is damaged; says where.
        ResumeError: there is none.
    """
    out = Path(out)
    path = place_of(out) / HEAD
    if not path.is_file():
        raise ResumeError(f"{out}: there is no unfinished work on it ({place_of(out)} has no {HEAD}).")
    head = _read(path)
    check_form(head, _HEAD_FORM, path)
    made_with = _made_with()
    differ = differences({name: head.get(name) for name in made_with}, made_with)
    if differ:
        raise ResumeError(
            f"{out}: the unfinished work of another version: {in_words(differ)}. Take that again, or say --force "
            "with the whole command to begin anew."
        )
    return {**head, "stands": _has_made(out)}


def forget(out: str | Path) -> None:
    """Drop the unfinished work on `out`, which must be claimed."""
    with contextlib.suppress(OSError):
        drop_work(Path(out))


def _begun(bench: Workbench, out: Path, task: Mapping[str, Any], command: str, force: bool) -> dict[str, Any]:
    """The head of the work: that of the earlier run where there was one, else a new one."""
    assert bench.folder is not None
    path = bench.folder / HEAD
    asked = json.loads(json.dumps({"command": command, "task": task, **_made_with()}))
    if goes_on(out) and not (force and _is_damaged(path)):
        there = _read(path)
        differ = differences({name: there.get(name) for name in asked}, asked)
        if not differ:
            return there
        if not force:
            raise ResumeError(
                f"{out} has the unfinished work of another run: {in_words(differ)}. To finish that one, "
                f"{_way_on(str(there.get('command')), out)}. To drop it, say --force."
            )
    shutil.rmtree(bench.folder, ignore_errors=True)
    with explained(bench.folder):
        bench.folder.mkdir()
    head = {
        **asked,
        "force": force,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    _write(path, head)
    return head


def _way_on(command: str, out: Path) -> str:
    if command not in RESUMABLE:
        return again(command)
    return f"go on with prunelm {command} --resume {out}"


def _made_with() -> dict[str, Any]:
    return {"format": FORMAT, "versions": versions(), "processes": size()}


def _has_made(out: Path) -> bool:
    """Whether what stands at `out` is what the unfinished work on it has made, and nothing else of that name."""
    note = place_of(out) / MADE
    return note.is_file() and note.read_text(encoding="utf-8") == str(identity(out))


def _is_damaged(path: Path) -> bool:
    try:
        _read(path)
    except ResumeError:
        return True
    return False


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data with their checksum."""
    write_whole(path, json.dumps({SUM: _sum_of(data), **data}, indent=1))


def _sum_of(data: Mapping[str, Any]) -> str:
    return _digest(json.dumps(data, sort_keys=True).encode())


def _read(path: Path) -> dict[str, Any]:
    """What `_write` has written.

    Raises:
        ResumeError: it is damaged; says how to begin anew.
    """
    anew = f"Say --force with the whole command, or remove {path.parent}, to begin anew."
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResumeError(f"{path}: cannot be read ({error}). {anew}") from error
    if not isinstance(found, dict) or found.pop(SUM, None) != _sum_of(found):
        raise ResumeError(f"{path}: damaged, its checksum differs. {anew}")
    return found


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]
