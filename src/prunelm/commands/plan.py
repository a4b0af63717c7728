"""`prunelm plan`."""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.table import Table

from .asked import limit_asked, others_said, recipe_asked
from .console import fits, out, print_json, progress_bars, quiet, tell
from .options import (
    Access,
    Allocator,
    AsJson,
    Blocks,
    Calibrated,
    Device,
    Faster,
    Fit,
    Hidden,
    MaybeModel,
    MaybeRecipe,
    Multiple,
    Parallel,
    Params,
    SampleLength,
    Samples,
    Sites,
    Targets,
    Text,
    Unit,
)

_KL = "predicted KL"


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much would go: one of several kinds of budget."""

    sparsity: Annotated[
        float | None, typer.Option(help="Share of the weights in the blocks to remove, between 0 and 1.")
    ] = None
    params: Params = None
    fit: Fit = None
    speedup: Faster = None
    edited: Annotated[
        Path | None, typer.Option("--plan", help="Show this plan, edited or not, in place of making one.")
    ] = None

    @property
    def limit(self) -> Any:
        """The budget in other units than sparsity, if that is what was given."""
        share = None if self.sparsity is None else str(self.sparsity)
        return limit_asked(share, self.edited, params=self.params, fit=self.fit, speedup=self.speedup)


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What is replaced in the recipe; named as its fields are, but for `uniform`."""

    PANEL: ClassVar = "Changes to the recipe"

    per_block: Annotated[bool | None, typer.Option(help="Let widths differ between blocks.")] = None
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Keep the same widths in every block, whatever the recipe says.")
    ] = False
    allocator: Allocator = None
    targets: Targets = None
    tensor_parallel: Parallel = None
    unit: Unit = None
    sites: Sites = None
    blocks: Blocks = None
    hidden: Hidden = None
    multiple_of: Multiple = None
    samples: Samples = None
    length: SampleLength = None


def plan(
    model: MaybeModel = None,
    out_file: Annotated[
        Path | None, typer.Argument(metavar="PLAN.json", help="File to write, for you to edit.")
    ] = None,
    *,
    size: Size,
    diff: Annotated[tuple[Path, Path] | None, typer.Option(help="Show where two plans differ; needs no model.")] = None,
    recipe: MaybeRecipe = None,
    text: Text = None,
    calibrated: Calibrated = None,
    context: Annotated[
        int, typer.Option(help="Tokens of context for which cache and operations are shown.", min=1)
    ] = 8192,
    overrides: Overrides,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace PLAN.json if it exists.")] = False,
    as_json: AsJson = False,
    access: Access,
) -> None:
    """Show what would be left of every block; write it to a file to edit and prune by (prune --plan)."""
    from ..errors import CheckpointError
    from ..planning import plan as run

    if diff is not None:
        others = others_said("--diff", model, out_file)
        if others:
            raise typer.BadParameter(f"--diff compares two plans alone: leave out {', '.join(others)}")
        _show_difference(diff, as_json)
        return
    if model is None:
        raise CheckpointError("no model is named: prunelm plan MODEL, or prunelm plan --diff A.json B.json.")
    limit = size.limit
    looks = text is not None or calibrated is not None
    asked = {"looks": looks, "calibrated": calibrated, **vars(overrides), "sparsity": size.sparsity}
    chosen = recipe_asked(recipe, size.edited, **asked)
    looking: dict[str, Any] = {"text": text, "calibrated": calibrated, "device": device, **vars(access)}
    with ExitStack() as printed:
        with quiet(), progress_bars() as progress:
            options = {"edited": size.edited, "limit": limit, "context": context, "force": force, "progress": progress}
            options["recipe"] = chosen if size.edited is None else None
            found = run(model, out_file, until=printed, **options, **looking)
        if as_json:
            print_json({**vars(found), "recipe": found.recipe.to_dict()})
            return
        _show(found)
        if out_file is not None:
            words = ["prunelm", "prune", model, "OUT", "--plan", str(out_file)]
            words += ["--text", "FILE"] if found.recipe.reads_text and found.recipe.calibration == "text" else []
            words += access.words
            out.print(f"{out_file}: written. Edit it, and apply it: {shlex.join(words)}")


def _show(found: Any) -> None:
    """The table of a plan, and what it would leave."""
    table, left_out = _outline_table(found.rows, found.context)
    out.print(table, soft_wrap=False)
    if left_out:
        out.print(f"No room for {', '.join(left_out)}: a wider terminal or --json shows them.")
    tell(found.notes)
    size = found.size
    out.print(
        f"{size['parameters']:,} parameters stay: {size['share_of_blocks']:.2%} of the blocks and "
        f"{size['share_of_model']:.2%} of the model would go"
    )


def _outline_table(rows: Sequence[dict[str, Any]], context: int) -> tuple[Table, list[str]]:
    """The rows, in as many columns as the terminal has room for, and the columns that are left out."""
    columns = _columns(rows, context)
    needed = 2 + len(dict.fromkeys(name for row in rows for name in row["units"]))
    due = [*columns][:needed]
    spare = sorted([*columns][needed:], key=_weight)
    if all(row["kl"] is None for row in rows):
        spare.remove(_KL)
        columns.pop(_KL)
    while True:
        shown = {title: cells for title, cells in columns.items() if title in (*due, *spare)}
        for titles in (list(shown), [title.replace(" ", "\n") for title in shown]):
            table = Table()
            for title in titles:
                table.add_column(title, no_wrap=True)
            for cells in zip(*shown.values(), strict=True):
                table.add_row(*cells)
            if fits(table) or not spare:
                return table, [title for title in columns if title not in shown]
        spare.pop()


def _weight(title: str) -> int:
    """Which columns stay longest where there is no room for all."""
    order = (_KL, "f16", "cache", "MFLOPs")
    return next((n for n, start in enumerate(order) if title.startswith(start)), len(order))


def _columns(rows: Sequence[dict[str, Any]], context: int) -> dict[str, list[str]]:
    """Every column by its title."""
    found = {"block": [row["block"] for row in rows]}
    for kind in dict.fromkeys(name for row in rows for name in row["units"]):
        pairs = (row["units"].get(kind) for row in rows)
        found[kind] = ["" if pair is None else f"{pair[0]:,}/{pair[1]:,}" for pair in pairs]
    found["parameters"] = [f"{row['parameters']:,}" for row in rows]
    for form in rows[0]["bytes"]:
        found[f"{form} bytes"] = [f"{row['bytes'][form]:,}" for row in rows]
    found[f"cache at {context:,}"] = [f"{row['cache']:,}" for row in rows]
    found["MFLOPs a token"] = [f"{row['flops'] / 1e6:,.1f}" for row in rows]
    found[_KL] = ["" if row["kl"] is None else f"{row['kl']:.4f}" for row in rows]
    return found


def _show_difference(paths: tuple[Path, Path], as_json: bool) -> None:
    """Where two plans differ, site by site."""
    from ..plan_file import PlanFile, differences

    rows = differences(*(PlanFile(path) for path in paths))
    if as_json:
        print_json(rows)
        return
    if not rows:
        out.print("The two plans keep the same units.")
        return
    table = Table("site", "units", *(path.name for path in paths), "parameters")
    for row in rows:
        keep = ("all" if kept is None else f"{kept:,}" for kept in row["keep"])
        change = "" if row["parameters"] is None else f"{row['parameters']:+,}"
        table.add_row(row["site"], "" if row["units"] is None else f"{row['units']:,}", *keep, change)
    known = [row["parameters"] for row in rows if row["parameters"] is not None]
    table.add_row("all", "", "", "", f"{sum(known):+,}")
    out.print(table, soft_wrap=False)
