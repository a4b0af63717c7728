"""`prunelm finalize`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import out, print_json, quiet
from .options import AsJson


def finalize(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Folder that another program saved; it is changed in place.")
    ],
    like: Annotated[
        Path | None, typer.Option(help="The folder that prunelm wrote, which the other program read.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put back what another program dropped when it saved FOLDER again (rotary keys, dtypes, widths)."""
    from ..finalizing import finalize as run

    with quiet():
        found = run(folder, like=like)
    if as_json:
        print_json(found)
        return
    out.print(f"{folder}: put back {', '.join(found)}" if found else f"{folder}: nothing was missing")
