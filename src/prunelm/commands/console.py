"""What commands print with: results go to stdout, and everything else to stderr."""

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

out = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)

_ENDLESS = 10_000
"""Characters in the line of a terminal in which everything has room."""


def fits(table: Table) -> bool:
    """Whether all that stands in a table has room in a line of the terminal."""
    return out.measure(table, options=out.options.update(max_width=_ENDLESS)).maximum <= out.width


def print_json(data: Any) -> None:
    """Print data as JSON, all of which has gone out then."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")
    sys.stdout.flush()


def tell(notes: Sequence[str]) -> None:
    """Print what a user must know, each once."""
    for note in dict.fromkeys(notes):
        err.print(f"note: {note}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Transformers' own bars and warnings stay off: errors are ours to explain."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield


@contextlib.contextmanager
def exactly(wanted: bool) -> Iterator[None]:
    """With `wanted`, only algorithms that give the same bits every time."""
    from ..placement import deterministic

    with deterministic(wanted):
        yield


@contextlib.contextmanager
def progress_bars() -> Iterator[Any]:
    """A function (stage, done, total) that draws a bar on stderr, or nothing without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield draw
