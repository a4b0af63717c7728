"""Unfinished work on nothing that is written: a workbench in the user's folder for states."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .differing import digest_of
from .errors import OutputError
from .journal import drop_forgotten, state_folder
from .workbench import Workbench, workbench
from .writing import claimed, explained


@contextlib.contextmanager
def workbench_until(
    until: contextlib.ExitStack | None, out: str | Path | None, task: Mapping[str, Any], *, command: str, force: bool
) -> Iterator[Workbench]:
    """The workbench of work on `out`; without that, one of its own, which stays until `until` is closed.

    Raises:
        PruneLMError: as `workbench` and `own_workbench` do.
    """
    with contextlib.ExitStack() as here:
        if out is None:
            yield (until or here).enter_context(own_workbench(task, command=command))
        else:
            yield here.enter_context(workbench(out, task, command=command, force=force))


@contextlib.contextmanager
def own_workbench(task: Mapping[str, Any], *, command: str) -> Iterator[Workbench]:
    """The workbench of work that writes no file beside which it could lie; see `prunelm.workbench.workbench`.

    Other tasks have others, so that none is ever refused; what nobody goes on with is removed in the end. Where the
    folder for states cannot be written, nothing is kept.

    Args:
        task: all that was asked, and all that it is asked of, as plain data.
        command: that goes on with it, once it is given again.

    Raises:
        OutputError: another process does the same work, or a finished step cannot be written.
    """
    folder = state_folder()
    if folder is None:
        yield Workbench()
        return
    drop_forgotten(folder)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{command}-{digest_of(task)[:16]}"
    try:
        with claimed(out), workbench(out, task, command=command) as bench:
            yield bench
    except OutputError as error:
        error.add_note("$XDG_STATE_HOME names another folder for unfinished work.")
        raise
