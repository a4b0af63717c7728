"""`prunelm transfer`."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..workflow import DEFAULT_RECIPE
from .console import out, print_json, progress_bars, quiet
from .options import Access, AsJson, Device, Length, MaxTokens, MaybeSeed, Model, RecipeName, SampleLength, Samples


def transfer(
    model: Model,
    texts: Annotated[
        list[Path], typer.Argument(metavar="TEXTS...", help="At least two texts; each is split into two parts.")
    ],
    sparsity: Annotated[float, typer.Option(help="Share of the weights in the blocks to remove, between 0 and 1.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="File for the results. If it exists, what is missing is added.")
    ] = None,
    samples: Samples = None,
    calibration_length: SampleLength = None,
    length: Length = 1024,
    max_tokens: MaxTokens = None,
    seed: MaybeSeed = None,
    device: Device = None,
    force: Annotated[
        bool, typer.Option("--force", help="Drop unfinished work on the file of other texts or another recipe.")
    ] = False,
    as_json: AsJson = False,
    *,
    access: Access,
) -> None:
    """Prune MODEL with one part of each text, and test every result on the other part of all texts."""
    from ..recipe import Recipe
    from ..text_matrix import transfer as run

    chosen = Recipe.load(recipe, sparsity=sparsity, samples=samples, length=calibration_length, seed=seed)
    opening: dict[str, Any] = {"device": device, **vars(access)}
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "force": force}
    with ExitStack() as printed:
        with quiet(), progress_bars() as progress:
            found = run(model, texts, recipe=chosen, out=out_file, progress=progress, until=printed, **sizes, **opening)
        if as_json:
            print_json(found)
            return
        names = [text.stem for text in texts]
        table = Table("calibrated on", *(f"tested on {name}" for name in names))
        cells = {(cell["calibrated"], cell["tested"]): cell for cell in found["cells"]}
        table.add_row("dense", *(f"{cells[names[0], name]['dense']['value']:.4g}" for name in names))
        for name in names:
            table.add_row(name, *(_transferred(cells[name, other]) for other in names))
        out.print(table, soft_wrap=False)


def _transferred(cell: dict[str, Any]) -> str:
    ratio = cell["ratio"]
    seen = " (text overlaps)" if cell["overlap"] and cell["overlap"]["flagged"] else ""
    ends = f" ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio["low"] is not None else ""
    return f"{cell['value']:.4g}, {ratio['value']:.2f}x{ends}{seen}"
