"""The command line in forked processes: as fresh as if just started, without importing the libraries each time."""

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunelm.cli import main

LATEST = 300.0
"""Seconds after which a run that has not ended is ended."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended: its exit status, negative for a signal, and what it said on stderr after the recipe's line."""

    status: int
    lines: list[str]

    @property
    def line(self) -> str:
        """The one line that it said, or all of them."""
        return " / ".join(self.lines)


class Run:
    """A command that runs in a process of its own."""

    def __init__(
        self, *words: object, log: Path, environment: Mapping[str, str] | None = None, largest_file: int | None = None
    ) -> None:
        self.log, self.started = log, time.monotonic()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            status = 1
            with contextlib.suppress(BaseException):
                _redirected(log)
                os.environ |= environment or {}
                if largest_file is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
                status = _status([str(word) for word in words])
            os._exit(status)
        self._ended: Ended | None = None

    def kill(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.process, number)

    def poll(self) -> Ended | None:
        """How it ended, or None while it runs."""
        if self._ended is None:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                # Killed at once, it has not begun its log.
                heard = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
                lines = heard.splitlines()
                said = [line for line in lines if not line.startswith(("recipe: ", "note: ", "streaming: "))]
                self._ended = Ended(status=os.waitstatus_to_exitcode(status), lines=said)
        return self._ended

    def wait(self) -> Ended:
        """How it ended, once it has; killed where that takes too long."""
        while (found := self.poll()) is None:
            if time.monotonic() - self.started > LATEST:
                os.kill(self.process, signal.SIGKILL)
            time.sleep(0.002)
        return found

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait until a condition holds; False where the run ended before."""
        while not condition():
            if self.poll() is not None:
                return False
            time.sleep(0.001)
        return True


def _redirected(log: Path) -> None:
    """Results to nowhere, everything else to a file."""
    heard = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(heard, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)


def _status(words: list[str]) -> int:
    """The exit status of the command line."""
    sys.argv = ["prunelm", *words]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stderr.flush()
    return 0
