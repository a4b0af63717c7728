"""`prunelm export`."""

from pathlib import Path
from typing import Annotated

import typer

from .console import out, print_json, progress_bars, quiet, tell
from .options import AsJson, Force, Model


def export(
    model: Model,
    out_path: Annotated[
        Path, typer.Argument(metavar="OUT", help="What to write: a file that ends in .gguf, or a folder.")
    ],
    format_: Annotated[
        str | None,
        typer.Option(
            "--format", help="gguf, nemotron-nas, onnx, padded or torchao-int8. Default: by the ending of OUT."
        ),
    ] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Format of the matrices in a .gguf file: f32, f16, bf16, q8_0 or q4_0.")
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="The dense model's .gguf file, from which to take vocabulary and metadata.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Convert MODEL for another program: llama.cpp (.gguf), vLLM (DeciLM), ONNX, torchao, or zero-padded."""
    from ..exporting import export as run

    with quiet(), progress_bars() as progress:
        found = run(model, out_path, format=format_, type=type_, parent=parent, force=force, progress=progress)
    tell(found.notes)
    if as_json:
        print_json({**vars(found), "path": str(found.path)})
        return
    out.print(f"{out_path}: {found.architecture}, {found.type}, {found.bytes:,} bytes, {found.proof}")
