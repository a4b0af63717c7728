"""A journal of long work: what was measured is written line by line, and not measured again after an interrupt."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from .differing import differences, digest_of, in_words
from .distributed import agreed_data, is_writer
from .errors import CalibrationError, OutputError, comes_again
from .writing import NOTHING_LEFT, beside, explained, write_whole

FORMAT = 2
MINUTE = 60.0
KEPT = timedelta(days=30)
"""How long unfinished work that has no place of its own waits for somebody to go on with it."""
_OURS = re.compile(r"[0-9a-f]{16}\.jsonl|demo-[0-9a-f]{12}|\.[a-z]+-[0-9a-f]{16}\.(work|lock|partial)")


class Journal:
    """Entries in the order in which they were made; those of an earlier run of the same work come first.

    Without a path nothing is kept. The first line says what the work is of, and must say the same each time. Every line
    is on the disk before the work goes on, and carries a checksum of all lines so far, so that one that was altered,
    lost or moved is noticed. A last line that was cut short by the interrupt is dropped. With `after`, nothing is
    written in so many seconds: shorter work leaves no file. Where it is `optional`, work goes on without it when it
    cannot be written any more. `kept` says whether the disk has an entry.
    """

    def __init__(
        self,
        path: Path | None = None,
        facts: Mapping[str, Any] | None = None,
        *,
        after: float = 0.0,
        optional: bool = False,
    ) -> None:
        self.path, self._optional = path if is_writer() else None, optional
        self._waits, self._begun, self._held = after, time.monotonic(), ""
        self._known: list[dict[str, Any]] = []
        self.read, self.kept = 0, False
        self._sum = ""
        if self.path is None or path is None:
            return
        head = json.loads(json.dumps({"format": FORMAT, **(facts or {})}))
        found = read_journal(path) if path.is_file() else []
        if found:
            _same(path, found[0], head)
            self._known = found[1:]
            self.kept = bool(self._known)
        lines = []
        for entry in (head, *self._known):
            line, self._sum = _sealed(entry, self._sum)
            lines.append(line)
        if after and not self._known:
            path.unlink(missing_ok=True)  # what there is was cut short before its first entry
            self._held = "".join(lines)
        else:
            write_whole(path, "".join(lines))

    def entry(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The next entry: read where there is one, else made and written at once.

        Raises:
            OutputError: it cannot be written.
        """
        known = agreed_data(self._known[self.read] if self.read < len(self._known) else None)
        if known is not None:
            self.read += 1
            return known
        made = agreed_data(make())
        if self.path is not None:
            line, self._sum = _sealed(made, self._sum)
            self._held += line
            if time.monotonic() - self._begun >= self._waits:
                self._write(self.path)
        return made

    def _write(self, path: Path) -> None:
        """Have what is held back on the disk."""
        try:
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as opened:
                    opened.write(self._held)
                    opened.flush()
                    os.fsync(opened.fileno())
        except OutputError:
            if not self._optional:
                raise
            self.path = None
        else:
            self.kept = True
        self._held = ""


@contextlib.contextmanager
def journal_beside(out: Path | None, name: str, facts: Mapping[str, Any], *, command: str) -> Iterator[Journal]:
    """The journal of one part of the work on a file, beside it; without a file nothing is kept.

    It goes when the body ends well, by which time the file must have the part, and with an error that would come again.
    Any other error says that `command` goes on.

    Raises:
        CalibrationError: the part was begun with other inputs; says what differs.
    """
    if out is None:
        yield Journal()
        return
    path = place_beside(out, name)
    if path.is_file() and not read_journal(path)[1:]:
        path.unlink()  # Nothing is lost, whatever it was to be of.
    journal = Journal(path, facts)
    try:
        yield journal
    except BaseException as error:
        if comes_again(error) or not journal.kept:
            path.unlink(missing_ok=True)
        else:
            add_way_on(error, again(command))
        raise
    path.unlink(missing_ok=True)


def place_beside(out: Path, name: str) -> Path:
    """Where the journal of one part of the work on a file lies: in one place, whatever the work is made of."""
    return beside(out, f"{name}.journal")


def again(command: str) -> str:
    """How work goes on whose command takes no --resume."""
    return f"give its command (prunelm {command}) again"


def add_way_on(error: BaseException, way: str) -> None:
    """Say how the work goes on where it stopped; what else the error said was left of it is no longer true."""
    note = f"What is done is kept; {way}"
    notes = [n for n in getattr(error, "__notes__", ()) if n not in (NOTHING_LEFT, note)]
    error.__notes__ = [*notes, note]


@contextlib.contextmanager
def own_journal(facts: Mapping[str, Any], *, command: str, spent: float = 0.0) -> Iterator[Journal]:
    """A journal of work that writes no file beside which it could lie, in the user's folder for states.

    It begins once the work has taken a minute, of which some seconds may be `spent`, and goes when the body ends well
    or with an error that would come again; any other says that `command` goes on. Where that folder cannot be written,
    nothing is kept; a damaged journal is begun anew.
    """
    folder = state_folder()
    if folder is None:
        yield Journal()
        return
    drop_forgotten(folder)
    path = folder / f"{digest_of(facts)[:16]}.jsonl"
    # Never at once: the first entry makes the folder.
    options: dict[str, Any] = {"after": max(MINUTE - spent, 1e-9), "optional": True}
    try:
        journal = Journal(path, facts, **options)
    except CalibrationError:
        path.unlink()
        journal = Journal(path, facts, **options)
    try:
        yield journal
    except BaseException as error:
        if comes_again(error):
            path.unlink(missing_ok=True)
        elif journal.kept:
            add_way_on(error, again(command))
        raise
    path.unlink(missing_ok=True)


def state_folder() -> Path | None:
    """Where unfinished work lies that has no place of its own, made or not; None where it cannot be written."""
    state = os.environ.get("XDG_STATE_HOME")
    folder = (Path(state) if state else Path.home() / ".local" / "state") / "prunelm"
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return folder if os.access(above, os.W_OK) else None


def drop_forgotten(folder: Path) -> None:
    """Remove unfinished work from the folder for states that nobody has gone on with for as long as `KEPT`."""
    begin = time.time() - KEPT.total_seconds()
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _OURS.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            if any(part.stat().st_mtime > begin for part in (path, *path.rglob("*"))):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The whole entries of a journal, the first of which says what it is of.

    Raises:
        CalibrationError: a line is damaged; says which.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CalibrationError(f"{path}: the journal cannot be read ({error.strerror}).") from error
    found: list[dict[str, Any]] = []
    last = ""
    for n, line in enumerate(lines[:-1], 1):
        entry = _opened(line)
        text, last = _sealed(entry, last) if entry is not None else ("", last)
        if entry is None or text.encode() != line + b"\n":
            raise CalibrationError(f"{path}: line {n} is damaged. Remove the file to start anew.")
        found.append(entry)
    return found


def _sealed(entry: Mapping[str, Any], last: str) -> tuple[str, str]:
    """An entry's line with its checksum, and that checksum; `last` is the one of the line before."""
    text = json.dumps(entry)
    checksum = hashlib.sha256((last + text).encode()).hexdigest()[:16]
    return f'{{"sum": "{checksum}", "entry": {text}}}\n', checksum


def _opened(line: bytes) -> dict[str, Any] | None:
    """The entry of a line; None where it holds none."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    entry = data.get("entry") if isinstance(data, dict) else None
    return entry if isinstance(entry, dict) else None


def _same(path: Path, there: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    differ = differences(there, head)
    if differ:
        raise CalibrationError(
            f"{path}: the journal of other work: {in_words(differ)}. Put that back, name another file, or remove "
            "this one to begin anew."
        )
