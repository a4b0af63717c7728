"""`prunelm prune`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.table import Table

from .asked import given, limit_asked, numbers, recipe_asked, resumed
from .console import err, exactly, out, print_json, progress_bars, quiet, tell
from .options import (
    Access,
    Allocator,
    AsJson,
    Blocks,
    Calibrated,
    ComputeDtype,
    Deterministic,
    Device,
    Faster,
    Fit,
    Force,
    Hidden,
    JournalFile,
    MaybeFolder,
    MaybeModel,
    MaybeRecipe,
    MaybeSeed,
    Multiple,
    Parallel,
    Params,
    Resume,
    SampleLength,
    Samples,
    Sites,
    Targets,
    Text,
    Unit,
)
from .tables import planned_cells
from .written import show_reports


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is to go: one of several kinds of budget."""

    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Share of the weights in the blocks to remove, between 0 and 1. Several, as in 0.1,0.2: a folder each."
        ),
    ] = None
    params: Params = None
    fit: Fit = None
    max_ppl: Annotated[
        str | None,
        typer.Option(
            help="Instead: perplexity on held-out text stays within this limit, e.g. +5% (above dense) or 18.5."
        ),
    ] = None
    speedup: Faster = None
    held_out_text: Annotated[
        Path | None,
        typer.Option(help="Text for --max-ppl. Default: the last tenth of --text, which then calibrates nothing."),
    ] = None
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Instead: exactly the units that this file of prunelm plan keeps.")
    ] = None

    @property
    def limit(self) -> Any:
        """The budget in other units than sparsity, if that is what was given."""
        said = {"params": self.params, "fit": self.fit, "max_ppl": self.max_ppl, "speedup": self.speedup}
        return limit_asked(self.sparsity, self.plan_file, **said)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the work is made with."""

    recipe: MaybeRecipe = None
    text: Text = None
    calibrated: Calibrated = None
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Calibrate on text that the model writes itself.")
    ] = False
    journal: JournalFile = None


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What is replaced in the recipe; named as its fields are, but for `uniform`."""

    PANEL: ClassVar = "Changes to the recipe"

    criterion: Annotated[
        str | None, typer.Option(help="Which units go first, instead of the recipe's way (prunelm list criteria).")
    ] = None
    allocator: Allocator = None
    reconstruction: Annotated[
        str | None,
        typer.Option(
            help="How the weights that stay are adjusted, instead of the recipe's way (prunelm list reconstructions)."
        ),
    ] = None
    ridge: Annotated[
        float | None, typer.Option(help="How strongly adjusted weights are pulled towards the present ones.")
    ] = None
    bias: Annotated[
        bool | None, typer.Option(help="Add biases for the adjustment to use, where the model's config allows them.")
    ] = None
    held_out: Annotated[
        float | None, typer.Option(help="Share of the calibration text that is kept apart to judge adjustments.")
    ] = None
    natural_steps: Annotated[
        int | None,
        typer.Option(help="Steps of natural gradient at the end, to bring the output nearer to the dense one.", min=0),
    ] = None
    per_block: Annotated[
        bool | None,
        typer.Option(help="Let widths differ between blocks; opens with trust_remote_code or prunelm.load."),
    ] = None
    uniform: Annotated[
        bool, typer.Option("--uniform", help="Keep the same widths in every block, whatever the recipe says.")
    ] = False
    targets: Targets = None
    tensor_parallel: Parallel = None
    unit: Unit = None
    attention_share: Annotated[
        float | None,
        typer.Option(
            help="What attention loses in proportion to --sparsity (1: the same share), where the allocator is uniform "
            "or per-module."
        ),
    ] = None
    loss: Annotated[
        str | None,
        typer.Option(help="Loss for gradients and policy searches: next-token, masked-lm, task, kl, drawn or auto."),
    ] = None
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing", help="Compute activations again in backward passes: less memory, more time."
        ),
    ] = None
    sites: Sites = None
    blocks: Blocks = None
    hidden: Hidden = None
    of: Annotated[
        str | None,
        typer.Option(help="What --sparsity is a share of: blocks (what can be pruned), or model (all parameters)."),
    ] = None
    multiple_of: Multiple = None
    samples: Samples = None
    length: SampleLength = None
    seed: MaybeSeed = None


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and in what the model computes, and what is written."""

    PANEL: ClassVar = "Device and data types"

    dtype: Annotated[
        str | None,
        typer.Option(help="Data type of the written weights: float32, float16 or bfloat16. Default: as stored."),
    ] = None
    device: Device = None
    compute_dtype: ComputeDtype = "float32"
    deterministic: Deterministic = False


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Whether one block is in memory at a time, and how the rest waits."""

    PANEL: ClassVar = "Models bigger than memory"

    stream: Annotated[bool, typer.Option("--stream", help="Hold only one block in memory at a time.")] = False
    scratch: Annotated[
        Path | None, typer.Option(help="Folder for the hidden states that wait on disk. Default: beside OUT.")
    ] = None
    scratch_dtype: Annotated[
        str | None, typer.Option(help="Data type of those hidden states: float32, float16 or bfloat16.")
    ] = None
    statistics_dtype: Annotated[
        str, typer.Option(help="Data type in which statistics are summed: float64 or float32.")
    ] = "float64"


def prune(
    model: MaybeModel = None,
    out_folder: MaybeFolder = None,
    *,
    size: Size,
    resume: Resume = None,
    inputs: Inputs,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be left, and stop; nothing is written.")
    ] = False,
    overrides: Overrides,
    computing: Computing,
    streamed: Streamed,
    force: Force = False,
    as_json: AsJson = False,
    access: Access,
) -> None:
    """Prune MODEL, and write the smaller model to the folder OUT."""
    if resume is not None:
        resumed(resume, "prune", model, as_json)
        return
    model, out_folder = given(MODEL=model, OUT=out_folder)
    limit = size.limit
    shares = numbers(size.sparsity) if size.sparsity is not None else []
    asked = {"looks": not streamed.stream, "calibrated": inputs.calibrated, **_replaced(shares, inputs, overrides)}
    chosen = recipe_asked(inputs.recipe, size.plan_file, **asked)
    if dry_run:
        with quiet():
            how = {"plan": size.plan_file, "limit": limit, "device": computing.device, **vars(access)}
            rows = _dry_runs(model, _sizes(chosen, shares), **how)
        _show_plans(rows, as_json)
        return
    budget = shares if len(shares) > 1 else size.sparsity and shares[0]
    said = {**chosen.to_dict(), "sparsity": budget} if size.plan_file is None else str(size.plan_file)
    err.print(f"recipe: {json.dumps(said)}")
    one = {"plan": size.plan_file, "limit": limit, **vars(streamed)}
    one |= {"held_out_text": size.held_out_text, "tell": err.print}
    options: dict[str, Any] = {"text": inputs.text, "calibrated": inputs.calibrated, "journal": inputs.journal}
    options |= {"force": force, **vars(computing), **vars(access)}
    if len(shares) > 1:
        _check_several(streamed, size.held_out_text)
        one = {}
    told: list[str] = []

    def announce(notes: Sequence[str]) -> None:
        told.extend(notes)
        tell(notes)

    with quiet(), progress_bars() as progress, exactly(options.pop("deterministic")):
        options |= {"announce": announce, "progress": progress, **one}
        options["recipe"] = chosen if size.plan_file is None else None
        reports = _pruned(model, out_folder, shares, options)
    show_reports(reports, as_json, told)


def _replaced(shares: Sequence[float], inputs: Inputs, overrides: Overrides) -> dict[str, Any]:
    """What the command line replaces in a recipe, with the smallest of several sizes."""
    calibration = "self-generated" if inputs.self_generated else None
    return {"sparsity": shares[0] if shares else None, **vars(overrides), "calibration": calibration}


def _dry_runs(model: str, sizes: Sequence[Any], **options: Any) -> list[dict[str, Any]]:
    from ..workflow.inspecting import dry_run

    return [dry_run(model, size, **options) for size in sizes]


def _sizes(chosen: Any, shares: Sequence[float]) -> list[Any]:
    """The recipe at each of the sizes."""
    return [replace(chosen, sparsity=share) for share in shares] or [chosen]


def _check_several(streamed: Streamed, held_out_text: Path | None) -> None:
    """Raise if something is asked for that several sizes at once do not go with."""
    from ..errors import RecipeError

    if streamed.stream:
        raise RecipeError("--stream makes one size at a time: give one sparsity")
    if streamed != Streamed():
        raise RecipeError("--scratch, --scratch-dtype and --statistics-dtype belong to --stream, which makes one size")
    if held_out_text is not None:
        raise RecipeError(f"--held-out-text {held_out_text} is what --max-ppl is measured on, and none is given")


def _pruned(model: str, out_folder: Path, shares: Sequence[float], options: dict[str, Any]) -> dict[Path, Any]:
    """The report of each folder that was written."""
    from ..workflow.one_size import prune
    from ..workflow.several_sizes import prune_sizes

    if len(shares) > 1:
        return prune_sizes(model, out_folder, shares, **options)
    return {out_folder: prune(model, out_folder, **options)}


def _show_plans(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(list(rows) if len(rows) > 1 else rows[0])
        return
    table = Table("parameters after", "of the blocks", "of the model", "kept per block")
    for row in rows:
        table.add_row(*planned_cells(row))
    out.print(table, soft_wrap=False)
    tell([note for row in rows for note in row["notes"]])
    out.print("Nothing was written (--dry-run).")
