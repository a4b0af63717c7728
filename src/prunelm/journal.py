"""A journal of a long search: what was measured is written line by line, and not measured again after an interrupt."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import CalibrationError

FORMAT = 1


class Journal:
    """Entries in the order in which they were made; those of an earlier run of the same search come first.

    Without a path nothing is kept. The first line says what the search is of, and must say the same each time. A last
    line that was cut short by the interrupt is dropped.
    """

    def __init__(self, path: Path | None = None, facts: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._known: list[dict[str, Any]] = []
        self.read = 0
        if path is None:
            return
        head = json.loads(json.dumps({"format": FORMAT, **(facts or {})}))
        lines = _whole_lines(path) if path.is_file() else []
        if lines:
            _same(path, lines[0], head)
            self._known = lines[1:]
        try:
            path.write_text("".join(json.dumps(line) + "\n" for line in (head, *self._known)), encoding="utf-8")
        except OSError as error:
            raise CalibrationError(f"{path}: the journal cannot be written ({error.strerror}).") from error

    def entry(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The next entry: read where there is one, else made and written at once."""
        if self.read < len(self._known):
            self.read += 1
            return self._known[self.read - 1]
        made = make()
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as opened:
                opened.write(json.dumps(made) + "\n")
        return made


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for n, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if n < len(lines) - 1:
                raise CalibrationError(
                    f"{path}: line {n + 1} is damaged ({error}). Remove the file to start anew."
                ) from error
    return found


def _same(path: Path, there: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    differ = sorted(name for name in {*there, *head} if there.get(name) != head.get(name))
    if differ:
        raise CalibrationError(
            f"{path}: the journal of another search ({', '.join(differ)} differ). Name another file, or remove it."
        )
