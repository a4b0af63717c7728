"""Files and folders that appear whole or not at all: written beside their place, synced to the disk, renamed."""

import contextlib
import errno
import functools
import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

from safetensors import SafetensorError

from .distributed import is_writer
from .errors import OutputError, PruneLMError
from .locking import locked

P = ParamSpec("P")
T = TypeVar("T")

PARTIAL, WORK, MADE = "partial", "work", "made"
"""Beside an output, the folder of its unfinished work, and in that the file that names what is about to stand there."""
NOTHING_LEFT = "Nothing was left behind."


def write_whole(target: str | Path, content: str | bytes) -> None:
    """Write a file in one rename, so that whatever happens leaves the old one or the new one.

    Raises:
        OutputError: it cannot be written; what was there stays.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.partial")
    with explained(target), locked(target):
        try:
            with partial.open("wb") as opened:
                opened.write(content.encode() if isinstance(content, str) else content)
                opened.flush()
                os.fsync(opened.fileno())
            if target.is_file():
                shutil.copymode(target, partial)
            partial.replace(target)
            _sync(target.absolute().parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(out: str | Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the body ends well, and leaves no trace when it does not.

    Raises:
        OutputError: `out` exists (without `force`), is being written by another process, cannot be written, or the
            disk is too full.
    """
    out = Path(out)
    with claimed(out):
        check_target(out, force=force, need_bytes=need_bytes)
        with _partial_folder(out) as partial:
            yield partial
            _usual_modes(partial)
            for path in [*partial.rglob("*"), partial]:
                _sync(path)
            _replace(partial, out)


@contextlib.contextmanager
def new_file(out: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A path in a temporary folder whose file becomes `out` when the body ends well.

    Raises:
        OutputError: as for `new_folder`.
    """
    out = Path(out)
    with claimed(out):
        check_file(out, force=force)
        with _partial_folder(out) as partial:
            yield partial / out.name
            _sync(partial / out.name)
            (partial / out.name).replace(out)
            _sync(out.absolute().parent)


@contextlib.contextmanager
def claimed(out: str | Path) -> Iterator[None]:
    """`out` belongs to this process while the body runs; what a killed run left beside it is cleared first.

    Raises:
        OutputError: another process is writing there; names it.
    """
    out = Path(out)
    check_parent(out)
    with contextlib.ExitStack() as stack:
        with explained(out):
            stack.enter_context(locked(out))
            old = beside(out, "old")
            if (old.exists() or old.is_symlink()) and not out.exists():
                old.rename(out)
            for left in (old, beside(out, PARTIAL)):
                _remove(left)
        yield


def writes(function: Callable[P, T]) -> Callable[P, T]:
    """The same function, whose arguments `out` and `journal`, where they are given, are claimed while it runs."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def claiming(*args: P.args, **kwargs: P.kwargs) -> T:
        given = signature.bind(*args, **kwargs).arguments
        with contextlib.ExitStack() as stack:
            for out in (given.get(name) for name in ("out", "journal")):
                if out is not None and is_writer():
                    stack.enter_context(claimed(out))
            return function(*args, **kwargs)

    return claiming


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    partial = beside(out, PARTIAL)
    try:
        with explained(out):
            partial.mkdir(exist_ok=True)
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def beside(out: Path, what: str) -> Path:
    """The hidden file or folder of some kind that belongs to an output."""
    return out.absolute().parent / f".{out.name}.{what}"


def drop_work(out: Path) -> None:
    """Let the unfinished work on `out` go at once; what a kill leaves of it is cleared like a folder half written."""
    work, rest = beside(out, WORK), beside(out, PARTIAL)
    _remove(rest)
    if work.exists():
        work.rename(rest)
        _remove(rest)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_parent(out: str | Path) -> None:
    """Raise if nothing can be made in the folder that `out` would lie in.

    Raises:
        OutputError: says whether it is missing or not writable.
    """
    parent = Path(out).absolute().parent
    if not parent.is_dir():
        raise OutputError(f"{out}: the folder {parent} does not exist. Make it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out}: the folder {parent} cannot be written to. Choose another.")


def check_target(out: str | Path, *, force: bool = False, need_bytes: int = 0) -> None:
    """Raise if a folder cannot be written there.

    Raises:
        OutputError: says which of existing, not writable, or disk full it is, and what to do.
    """
    out = Path(out)
    if not is_writer():
        return
    if out.exists() and not force:
        raise OutputError(f"{out} exists. Choose another folder, or say --force to replace it.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file, not a folder. Choose another name.")
    if out.name in ("", "..") or os.path.ismount(out):
        raise OutputError(f"{out} cannot be replaced as a whole. Name a folder in it.")
    check_parent(out)
    free = shutil.disk_usage(out.absolute().parent).free
    if free < need_bytes:
        raise OutputError(f"{out}: about {need_bytes:,} bytes are needed, {free:,} are free on that disk.")


def check_file(out: str | Path, *, force: bool = False) -> None:
    """Raise if a file cannot be written there.

    Raises:
        OutputError: says which of a folder, existing or not writable it is, and what to do.
    """
    out = Path(out)
    if out.is_dir():
        raise OutputError(f"{out} is a folder: name a file in it.")
    if out.exists() and not force:
        raise OutputError(f"{out} exists. Choose another name, or say --force to replace it.")
    check_parent(out)


@contextlib.contextmanager
def explained(out: str | Path) -> Iterator[None]:
    """What the system says about a failed write becomes one line.

    Raises:
        OutputError: with the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, PruneLMError):
            raise
        failed = OutputError(f"{out}: cannot be written: {reason(error)}.")
        failed.add_note(NOTHING_LEFT)
        raise failed from error


def reason(error: Exception) -> str:
    """Why something could not be written, in words."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full"
    return getattr(error, "strerror", None) or str(error)


def identity(path: Path) -> int | None:
    """What tells a file or folder from another that takes its name later; None where there is none."""
    return path.stat().st_ino if path.exists() else None


def _sync(path: Path) -> None:
    """Have a file or folder on the disk before anything that hangs on it is said to be there."""
    if os.name != "posix":
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _usual_modes(folder: Path) -> None:
    """Give what libraries wrote the permissions that new files get; some make their files private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _replace(partial: Path, out: Path) -> None:
    """Rename the finished folder into place; an old one there is kept until the new one stands."""
    old, work = beside(out, "old"), beside(out, WORK)
    if work.is_dir():
        write_whole(work / MADE, str(identity(partial)))
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.absolute().parent)
    _remove(old)
