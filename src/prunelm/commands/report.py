"""`prunelm report`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import out, quiet, tell


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders that prune wrote, or one folder that holds several.")
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", help="File to write. Default: report.html in the first folder.")
    ] = None,
) -> None:
    """Write one HTML page that shows what pruning did; it needs no network."""
    from ..report import write_report

    with quiet():
        written = write_report(folders, out_file, tell=tell)
    out.print(f"{written}: written. Open it in a browser.")
