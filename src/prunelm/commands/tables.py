"""Tables that more than one command shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..doubts import flags


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Measures down, models across, the first being the dense one."""
    table = Table("", *(Path(row["model"]).name for row in rows))
    table.add_row("parameters", *(f"{row['parameters']:,}" for row in rows))
    table.add_row("bytes on disk", *(f"{row['bytes']:,}" for row in rows))
    table.add_row("as float16", *(f"{2 * row['parameters']:,}" for row in rows))
    quality = [dict(quality_rows(row["evaluation"])) if "evaluation" in row else {} for row in rows]
    for name in dict.fromkeys(name for measures in quality for name in measures):
        table.add_row(name, *(measures.get(name, "") for measures in quality))
    if any("tokens_per_second" in row for row in rows):
        speeds = (f"{row['tokens_per_second']:,.0f} ({row['speedup']:.2f}x)" for row in rows)
        table.add_row("prefill tokens/s", *speeds)
    return table


def overlaps(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What must be said of a comparison whose text the models were calibrated on."""
    found = [row["evaluation"]["facts"] for row in rows if "evaluation" in row]
    return [note for facts in found for note in flags(facts["text"], facts.get("overlap"))]


def quality_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """(measure, value) of an evaluation."""
    rows = []
    if found["value"] is not None:
        rows.append((found["metric"], with_error(found)))
    for name, label, form in (
        ("bits_per_byte", "bits per byte", "{:.4f}"),
        ("kl", "KL to dense", "{:.4f}"),
        ("top1", "same top token", "{:.1%}"),
        ("cosine", "cosine to dense", "{:.4f}"),
    ):
        if found[name] is not None:
            rows.append((label, form.format(found[name])))
    return rows


def with_error(found: dict[str, Any]) -> str:
    """A value, with its standard error where there is one."""
    return f"{found['value']:.4g}" + (f" +- {found['error']:.2g}" if found["error"] is not None else "")


def planned_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    """What a budget leaves: parameters, shares of the blocks and of the model that go, widths."""
    kept = ", ".join(
        f"{name} {widths[0]}" + (f" to {widths[-1]}" if widths[1:] else "") for name, widths in row["kept"].items()
    )
    shares = (f"{row['share_of_blocks']:.2%}", f"{row['share_of_model']:.2%}")
    return f"{row['parameters']:,}", *shares, kept or "decided by measurements"
