"""One process at a time writes to a place; the lock goes with its process, however that ends."""

import contextlib
import errno
import json
import os
import platform
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import OutputError

if os.name == "posix":
    import fcntl

_HELD: set[tuple[Path, int]] = set()
"""Lock files held by this process, with the thread that took them: what one function locks, its callees may lock."""


@contextlib.contextmanager
def locked(out: str | Path) -> Iterator[None]:
    """Nobody else writes to `out` while the body runs.

    The lock is on a file `.NAME.lock` beside `out`, which names its holder and goes at the end. After a kill it may
    stay, and holds nobody up: the system has freed it. Where the file system knows no locks, nothing is locked.

    Raises:
        OSError: the lock file cannot be made.
        OutputError: another process holds it; names that.
    """
    out = Path(out)
    path = out.absolute().parent.resolve() / f".{out.name}.lock"
    key = (path, threading.get_ident())
    if key in _HELD or os.name != "posix":
        yield
        return
    opened: int | None = None
    try:
        opened = _acquired(path, out)
        _HELD.add(key)
        yield
    finally:
        _HELD.discard(key)
        if opened is not None:
            path.unlink(missing_ok=True)
            os.close(opened)


def _acquired(path: Path, out: Path) -> int:
    """The open lock file, locked, and still the one at its path."""
    while True:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out} is being written by {_holder(opened)}. Wait for it, or name another.") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(opened), path.stat()):
                facts = {"process": os.getpid(), "host": platform.node(), "command": sys.argv[1:2]}
                os.ftruncate(opened, 0)
                with contextlib.suppress(OSError):
                    os.write(opened, json.dumps(facts).encode())
                return opened
        os.close(opened)


def _holder(opened: int) -> str:
    """The process that holds a lock, in words, as far as its file says; closes the file."""
    raw = os.pread(opened, 4096, 0)
    os.close(opened)
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        facts = json.loads(raw)
    command = f" (prunelm {facts['command'][0]})" if facts.get("command") else ""
    return f"process {facts['process']} on {facts['host']}{command}" if "process" in facts else "another process"
