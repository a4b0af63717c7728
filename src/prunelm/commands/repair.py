"""`prunelm repair`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import progress_bars, quiet
from .options import Access, AsJson, Device, Folder, Force, Seed
from .written import show_reports


def repair(
    dense: Annotated[str, typer.Argument(help="The model that was pruned.")],
    pruned: Annotated[str, typer.Argument(help="What was made of it.")],
    out_folder: Folder,
    text: Annotated[Path, typer.Option(help="Text file, .jsonl with a text field, or folder of them.")],
    reconstruction: Annotated[str, typer.Option(help="Which repair.")] = "least-squares",
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a calibration sequence.", min=8)] = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
    *,
    access: Access,
) -> None:
    """Solve the weights of somebody's pruned model again, so that they make up for what was removed."""
    from ..workflow.repairing import repair as run

    with quiet(), progress_bars() as progress:
        report = run(
            dense,
            pruned,
            out_folder,
            text=text,
            reconstruction=reconstruction,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            force=force,
            progress=progress,
            **vars(access),
        )
    show_reports({out_folder: report}, as_json)
