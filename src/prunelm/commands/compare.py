"""`prunelm compare`."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .asked import words
from .console import err, fits, out, print_json, progress_bars, quiet, tell
from .options import Access, AsJson, Device, Length, MaxTokens, Text
from .tables import comparison_table, overlaps, with_error


def compare(
    dense: Annotated[str, typer.Argument(metavar="DENSE", help="The model before pruning.")],
    pruned: Annotated[list[str], typer.Argument(metavar="PRUNED...", help="One or more pruned models.")],
    text: Text = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Also write an HTML page, as prunelm report does, to this file.")
    ] = None,
    length: Length = 1024,
    max_tokens: MaxTokens = None,
    quantized: Annotated[
        str | None,
        typer.Option(help="Also round all weights to these formats, e.g. q8_0,q5_0,q4_0, and compare at equal bytes."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    *,
    access: Access,
) -> None:
    """Show the size, quality and speed of several models side by side."""
    from ..workflow.comparing import compare as run

    if out_file is not None:
        from ..report.gathering import model_folders
        from ..writing import check_file

        check_file(out_file, force=True)
        for name in pruned:
            model_folders(Path(name))
    with ExitStack() as printed:
        with quiet(), progress_bars() as progress:
            rows = run(
                [dense, *pruned],
                text,
                length=length,
                max_tokens=max_tokens,
                quantized=words(quantized),
                progress=progress,
                until=printed,
                device=device,
                **vars(access),
            )
        tell(overlaps(rows))
        _show(rows, quantized=bool(words(quantized)), as_json=as_json)
        if out_file is not None:
            from ..report.comparing import write_comparison

            windows = {"length": length, "max_tokens": max_tokens, "dtype": "float32"}
            written = write_comparison(rows, pruned, text, windows, out_file, tell=tell)
            err.print(f"{written}: written. Open it in a browser.")


def _show(rows: Sequence[dict[str, Any]], *, quantized: bool, as_json: bool) -> None:
    """Print what was measured."""
    if as_json:
        print_json(rows)
        return
    for table in fitting_tables(rows):
        out.print(table, soft_wrap=False)
    if quantized:
        out.print(quantized_table(rows), soft_wrap=False)


def fitting_tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """All models in one table, or, where the terminal has no room for that, a few in each, the dense one first."""
    done = 1
    while done < len(rows):
        for count in range(len(rows) - done, 0, -1):
            table = comparison_table([rows[0], *rows[done : done + count]])
            if count == 1 or fits(table):
                yield table
                done += count
                break


def quantized_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every model in every format, by bytes, beside what the dense model has in as many."""
    from ..quantizing import at_equal_bytes

    table = Table("bytes of weights", "model", "format", "perplexity", "dense in as many bytes", "ratio")
    dense = rows[0]["quantized"]
    found = [(row, form) for row in rows for form in row["quantized"]]
    for row, form in sorted(found, key=lambda pair: pair[1]["bytes"]):
        cells = [f"{form['bytes']:,}", Path(row["model"]).name, form["format"]]
        if "value" not in form or form["value"] is None:
            table.add_row(*cells, "", "", "")
            continue
        same = at_equal_bytes(dense, form) if row is not rows[0] and form["metric"] == "perplexity" else None
        beside = [f"{same:.4g}", f"{form['value'] / same:.3f}"] if same is not None else ["", ""]
        table.add_row(*cells, with_error(form), *beside)
    return table
