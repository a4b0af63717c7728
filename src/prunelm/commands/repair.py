"""`prunelm repair`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import exactly, progress_bars, quiet
from .options import Access, AsJson, Deterministic, Device, Folder, Force, Seed
from .written import show_reports


def repair(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model before pruning.")],
    pruned: Annotated[str, typer.Argument(metavar="PRUNED", help="The same model, pruned by any program.")],
    out_folder: Folder,
    text: Annotated[Path, typer.Option(help="Text file (.txt, .md), .jsonl with a field text, or a folder of these.")],
    reconstruction: Annotated[
        str, typer.Option(help="How the weights are adjusted (prunelm list reconstructions).")
    ] = "least-squares",
    ridge: Annotated[
        float, typer.Option(help="How strongly adjusted weights are pulled towards the present ones.")
    ] = 0.1,
    bias: Annotated[
        bool | None,
        typer.Option(
            help="Add biases for the adjustment to use, where the model's config allows them. Default: where PRUNED "
            "has biases that DENSE lacks."
        ),
    ] = None,
    held_out: Annotated[
        float, typer.Option(help="Share of the calibration text that is kept apart to judge adjustments.")
    ] = 0.125,
    natural_steps: Annotated[
        int, typer.Option(help="Steps of natural gradient at the end (prunelm prune has them too).", min=0)
    ] = 0,
    samples: Annotated[int, typer.Option(help="Number of calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in each calibration sequence.", min=8)] = 512,
    seed: Seed = 0,
    device: Device = None,
    deterministic: Deterministic = False,
    force: Force = False,
    as_json: AsJson = False,
    *,
    access: Access,
) -> None:
    """Adjust the weights of a model that was pruned elsewhere, to make up for what was removed."""
    from ..workflow.repairing import repair as run

    with quiet(), progress_bars() as progress, exactly(deterministic):
        report = run(
            dense,
            pruned,
            out_folder,
            text=text,
            reconstruction=reconstruction,
            ridge=ridge,
            bias=bias,
            held_out=held_out,
            natural_steps=natural_steps,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            force=force,
            progress=progress,
            **vars(access),
        )
    show_reports({out_folder: report}, as_json)
