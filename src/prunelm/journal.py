"""A journal of long work: what was measured is written line by line, and not measured again after an interrupt."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .distributed import agreed_data, is_writer
from .errors import CalibrationError, PruneLMError
from .writing import explained, write_whole

FORMAT = 2
MINUTE = 60.0


class Journal:
    """Entries in the order in which they were made; those of an earlier run of the same work come first.

    Without a path nothing is kept. The first line says what the work is of, and must say the same each time. Every line
    is on the disk before the work goes on, and carries a checksum of all lines so far, so that one that was altered,
    lost or moved is noticed. A last line that was cut short by the interrupt is dropped. With `after`, nothing is
    written in so many seconds: shorter work leaves no file.
    """

    def __init__(self, path: Path | None = None, facts: Mapping[str, Any] | None = None, *, after: float = 0.0) -> None:
        self.path = path if is_writer() else None
        self._waits, self._begun, self._held = after, time.monotonic(), ""
        self._known: list[dict[str, Any]] = []
        self.read = 0
        self._sum = ""
        if self.path is None or path is None:
            return
        head = json.loads(json.dumps({"format": FORMAT, **(facts or {})}))
        found = read_journal(path) if path.is_file() else []
        if found:
            _same(path, found[0], head)
            self._known = found[1:]
        lines = []
        for entry in (head, *self._known):
            line, self._sum = _sealed(entry, self._sum)
            lines.append(line)
        if after and not self._known:
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
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with explained(self.path), self.path.open("a", encoding="utf-8") as opened:
                    opened.write(self._held)
                    opened.flush()
                    os.fsync(opened.fileno())
                self._held = ""
        return made


@contextlib.contextmanager
def own_journal(facts: Mapping[str, Any]) -> Iterator[Journal]:
    """A journal of work that writes no file beside which it could lie, in the user's folder for states.

    It begins once the work has taken a minute, and goes when the body ends well. Where that folder cannot be written,
    nothing is kept; a damaged journal is begun anew.
    """
    state = os.environ.get("XDG_STATE_HOME")
    folder = (Path(state) if state else Path.home() / ".local" / "state") / "prunelm"
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    path = folder / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}.jsonl"
    if not os.access(above, os.W_OK):
        yield Journal()
        return
    try:
        journal = Journal(path, facts, after=MINUTE)
    except CalibrationError:
        path.unlink()
        journal = Journal(path, facts, after=MINUTE)
    try:
        yield journal
    except PruneLMError:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


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
    differ = sorted(name for name in {*there, *head} if there.get(name) != head.get(name))
    if differ:
        raise CalibrationError(
            f"{path}: the journal of another search ({', '.join(differ)} differ). Name another file, or remove it."
        )
