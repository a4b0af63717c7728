"""The files of an export, which wait in a workbench until they are proven: what was interrupted goes on from them."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .calibration import fingerprint
from .journal import Journal
from .loading import Source, sha256_of
from .progress import Progress, silent
from .workbench import WORTH_KEEPING, Step, Workbench, lasting, workbench
from .writing import claimed, explained, new_file, new_folder

FILES = "files"


@contextlib.contextmanager
def exported_folder(
    out: str | Path,
    source: Source,
    write: Callable[[Path], None],
    *,
    format: str,
    force: bool,
    need_bytes: int,
    progress: Progress = silent,
) -> Iterator[Path]:
    """A folder with what `write` makes in it, which becomes `out` when the body ends well.

    What an earlier run of the same work has written whole is found again.

    Raises:
        OutputError: as for `new_folder`.
        ResumeError: there is the unfinished work of another export, or of another model.
    """
    with _unfinished(out, source, {"format": format}, force=force) as bench:
        place = _place(bench)
        written = _stands(place, bench.get(FILES))
        with new_folder(out, force=force, need_bytes=0 if written else need_bytes) as folder:
            progress("writing", int(written), 1)
            if not written:
                _write(place, bench, write)
            progress("writing", 1, 1)
            progress("proving", 0, 1)
            yield place
            progress("proving", 1, 1)
            for path in place.iterdir():
                path.replace(folder / path.name)


@contextlib.contextmanager
def exported_file(
    out: str | Path, source: Source, *, type: str, parent: str | Path | None, force: bool
) -> Iterator[tuple[Path, Journal]]:
    """Where `write_parts` writes a file, over what an earlier run has left of it, and the journal of its parts.

    The file becomes `out` when the body ends well.

    Raises:
        OutputError: as for `new_file`.
        ResumeError: there is the unfinished work of another export, or of another model.
    """
    with _unfinished(out, source, {"type": type}, parent, force=force) as bench, new_file(out, force=force) as file:
        yield _place(bench), bench.journal(FILES, after=WORTH_KEEPING)
        _place(bench).replace(file)


@contextlib.contextmanager
def _unfinished(
    out: str | Path, source: Source, asked: dict[str, Any], parent: str | Path | None = None, *, force: bool
) -> Iterator[Workbench]:
    """The workbench of an export, which is of one model."""
    task = {"model": lasting(source.name), "parent": lasting(parent), **asked}
    with claimed(out), workbench(out, task, command="export", force=force) as bench:
        bench.check({"model": fingerprint(source), "parent": None if parent is None else sha256_of(Path(parent))})
        yield bench


def _place(bench: Workbench) -> Path:
    assert bench.folder is not None
    return bench.folder / FILES


def _stands(place: Path, step: Step | None) -> bool:
    """Whether all files of a folder are as they were when they had been written."""
    return step is not None and place.is_dir() and _sums(place) == step.facts["sums"]


def _write(place: Path, bench: Workbench, write: Callable[[Path], None]) -> None:
    shutil.rmtree(place, ignore_errors=True)
    start = time.monotonic()
    with explained(place):
        place.mkdir()
    write(place)
    if time.monotonic() - start >= WORTH_KEEPING:
        bench.put(FILES, Step(facts={"sums": _sums(place)}))


def _sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a file: its name, how many bytes it has, and what makes them."""

    name: str
    bytes: int
    make: Callable[[], bytes]


def write_parts(path: Path, head: bytes, parts: Sequence[Part], journal: Journal, progress: Progress = silent) -> None:
    """Write a file from its head and its parts, one of them in memory at a time.

    Parts that the file has already, by their checksums in the journal, are not made again.
    """
    with path.open("r+b" if path.exists() else "w+b") as opened:
        opened.write(head)
        for n, part in enumerate(parts):
            progress("writing", n, len(parts))
            start = opened.tell()
            known = journal.entry(partial(_put, opened, part))
            if opened.tell() == start and _sum(opened.read(part.bytes)) != known["sum"]:
                opened.seek(start)
                _put(opened, part)
        opened.truncate()
    progress("writing", len(parts), len(parts))


def _put(opened: BinaryIO, part: Part) -> dict[str, str]:
    content = part.make()
    opened.write(content)
    opened.flush()
    return {"part": part.name, "sum": _sum(content)}


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
