"""`prunelm inspect`."""

from typing import Annotated, Any

import typer
from rich.table import Table

from .console import out, print_json, quiet, tell
from .options import Access, AsJson, Model
from .tables import planned_cells


def inspect(
    model: Model,
    unit: Annotated[
        str,
        typer.Option(help="What attention would lose: group (whole KV groups) or query (query heads of every group)."),
    ] = "group",
    as_json: AsJson = False,
    *,
    access: Access,
) -> None:
    """Show what can be removed from MODEL, and what 10, 20 and 30 % would leave; reads no weight."""
    from ..workflow.inspecting import inspect as run

    with quiet():
        found = run(model, unit=unit, **vars(access))
    if as_json:
        kept = {k: v for k, v in vars(found).items() if k != "sites"}
        print_json({**kept, "sites": [_site(site) for site in found.sites]})
        return
    out.print(f"{found.name}: {found.model_type}, {found.parameters:,} parameters, {found.prunable:,} of them prunable")
    out.print(_sites_table(found.sites), soft_wrap=False)
    budgets = Table("--sparsity", "parameters after", "of the blocks", "of the model", "kept per block")
    for row in found.budgets:
        if "error" in row:
            budgets.add_row(f"{row['sparsity']:g}", row["error"])
        else:
            budgets.add_row(f"{row['sparsity']:g}", *planned_cells(row))
    out.print(budgets, soft_wrap=False)
    tell([note for row in found.budgets for note in row.get("notes", [])])


def _site(site: Any) -> dict[str, Any]:
    return {
        "key": site.key,
        "units": site.n_units,
        "cost": site.cost,
        "consumer": site.consumer.path,
        "stock": site.spec.stock,
    }


def _sites_table(sites: list[Any]) -> Table:
    """A row for each kind of site."""
    first = {site.name: site for site in reversed(sites)}
    table = Table("site", "blocks", "units per block", "parameters per unit", "fewer units open in transformers")
    for site in sorted(first.values(), key=lambda s: s.name):
        same = [s for s in sites if s.name == site.name]
        widths = sorted({s.n_units for s in same})
        span = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        opens = "yes" if site.spec.stock else "only with --per-block"
        table.add_row(site.name, str(len(same)), span, f"{site.cost:,}", opens)
    return table
