"""The command line: each command is one library call and the printing of its result. stdout carries results only."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .errors import PruneLMError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make transformer language models smaller by structured pruning, without retraining.",
)
out = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a run early, and is answered in one line."""
SHARED = ("prune", "calibrate", "repair")
"""Commands that several processes share."""
err = Console(stderr=True, soft_wrap=True, markup=False, highlight=False, emoji=False)

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Accept pickle weights, which can run any code.")]
Length = Annotated[int, typer.Option(help="Tokens in an evaluation window.", min=2)]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens of text.", min=2)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; by default a GPU of CUDA where there is one.")
]
ComputeDtype = Annotated[str, typer.Option(help="Of the model while it is pruned: float32, bfloat16, float16.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Only algorithms that give the same bits every time, on GPUs too.")
]
Resume = Annotated[
    Path | None, typer.Option(metavar="OUT", help="Finish the interrupted run into OUT; say nothing else.")
]
Targets = Annotated[
    str | None,
    typer.Option("--for", help="Programs that must open it: transformers, vllm, llama.cpp (several, or any)."),
]
Parallel = Annotated[int | None, typer.Option(help="Devices that heads and channels divide over.")]
Text = Annotated[Path | None, typer.Option(help="Text file, .jsonl with a text field, or folder of them.")]
Params = Annotated[str | None, typer.Option(help="Budget: at most so many parameters, as in 1.0B.")]
Fit = Annotated[str | None, typer.Option(help="Budget: bytes of weights in a format and cache, as in 8GB@q4_k_m+8k.")]
Faster = Annotated[str | None, typer.Option("--speedup", help="Budget: measured speed, as in 1.5, or 1.5@decode.")]


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command stand before its name."""


@app.command()
def inspect(
    model: Model,
    unit: Annotated[
        str, typer.Option(help="A unit of attention: group (KV head with its queries) or query.")
    ] = "group",
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Show a model's sites, the cost of a unit, and what 10, 20 and 30 % would mean."""
    from .workflow import inspect as run

    with _quiet():
        found = run(model, unit=unit, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    first = {site.name: site for site in reversed(found.sites)}
    if as_json:
        sites = [
            {
                "key": s.key,
                "units": s.n_units,
                "cost": s.cost,
                "consumer": s.consumer.path,
                "stock": s.spec.stock,
            }
            for s in found.sites
        ]
        kept = {k: v for k, v in vars(found).items() if k != "sites"}
        _print_json({**kept, "sites": sites})
        return
    out.print(f"{found.name}: {found.model_type}, {found.parameters:,} parameters, {found.prunable:,} of them prunable")
    table = Table("site", "blocks", "units per block", "parameters per unit", "fewer units open in transformers")
    for site in sorted(first.values(), key=lambda s: s.name):
        same = [s for s in found.sites if s.name == site.name]
        widths = sorted({s.n_units for s in same})
        span = str(widths[0]) if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        opens = "yes" if site.spec.stock else "with prunelm.load (--per-block)"
        table.add_row(site.name, str(len(same)), span, f"{site.cost:,}", opens)
    out.print(table, soft_wrap=False)
    budgets = Table("--sparsity", "parameters after", "of the blocks", "of the model", "kept per block")
    for row in found.budgets:
        if "error" in row:
            budgets.add_row(f"{row['sparsity']:g}", row["error"])
        else:
            budgets.add_row(f"{row['sparsity']:g}", *_planned(row))
    out.print(budgets, soft_wrap=False)
    _notes([note for row in found.budgets for note in row.get("notes", [])])


@app.command()
def prune(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")] = None,
    out_folder: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder to write.")] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            help="Share of the prunable parameters to remove, in (0, 1); several, as in 0.1,0.2, make a family."
        ),
    ] = None,
    params: Params = None,
    fit: Fit = None,
    max_ppl: Annotated[
        str | None, typer.Option(help="Budget: perplexity on held-out text, as in +5% above dense, or 18.5.")
    ] = None,
    speedup: Faster = None,
    held_out_text: Annotated[
        Path | None, typer.Option(help="Text that --max-ppl is measured on; a tenth of --text by default.")
    ] = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="File of prunelm plan, edited or not.")] = None,
    resume: Resume = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or .toml file; goa-budget by default.")] = None,
    text: Text = None,
    calibrated: Annotated[Path | None, typer.Option(help="Folder of prunelm calibrate, to skip that pass.")] = None,
    self_generated: Annotated[bool, typer.Option("--self-generated", help="Calibrate on text by the model.")] = False,
    journal: Annotated[Path | None, typer.Option(help="File that lets an interrupted search go on.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    criterion: Annotated[str | None, typer.Option(help="Replace the recipe's criterion at every site.")] = None,
    allocator: Annotated[str | None, typer.Option(help="Replace the recipe's allocator.")] = None,
    reconstruction: Annotated[str | None, typer.Option(help="Replace the recipe's reconstruction.")] = None,
    ridge: Annotated[float | None, typer.Option(help="Pull of a refit towards the present weights.")] = None,
    bias: Annotated[bool | None, typer.Option(help="Give consumers a bias where the config can.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share of the calibration that judges repairs.")] = None,
    per_block: Annotated[
        bool | None, typer.Option(help="Widths may differ (opens with trust_remote_code or prunelm.load).")
    ] = None,
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same widths in every block, for plain loaders.")
    ] = False,
    targets: Targets = None,
    tensor_parallel: Parallel = None,
    unit: Annotated[str | None, typer.Option(help="A unit of attention: group or query.")] = None,
    attention_share: Annotated[float | None, typer.Option(help="Attention's sparsity relative to the whole.")] = None,
    loss: Annotated[str | None, typer.Option(help="What gradients are of and policies search by; kl, task...")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory and more time for backward passes.")
    ] = None,
    sites: Annotated[str | None, typer.Option(help="attention, ffn, or attention,ffn.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks that may lose units, as in 4:-2.")] = None,
    hidden: Annotated[float | None, typer.Option(help="Share of the residual stream's channels to remove.")] = None,
    of: Annotated[str | None, typer.Option(help="What sparsity is a share of: blocks or model.")] = None,
    multiple_of: Annotated[int | None, typer.Option(help="Kept FFN channels are a multiple of this.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")] = None,
    seed: Annotated[int | None, typer.Option(help="For everything random.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the written weights: float32, float16, bfloat16.")] = None,
    device: Device = None,
    compute_dtype: ComputeDtype = "float32",
    deterministic: Deterministic = False,
    stream: Annotated[bool, typer.Option("--stream", help="Hold one block in memory at a time.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Folder for a streamed run's hidden states.")] = None,
    scratch_dtype: Annotated[str | None, typer.Option(help="Of hidden states there: float32, float16...")] = None,
    statistics_dtype: Annotated[str, typer.Option(help="Of a streamed run's sums: float64, float32.")] = "float64",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL into OUT, a folder that opens elsewhere."""
    from .errors import RecipeError
    from .workflow import dry_run as plan
    from .workflow import prune as run
    from .workflow import prune_sizes as run_sizes

    if resume is not None:
        _resume(resume, "prune", model, as_json)
        return
    model, out_folder = _given(MODEL=model, OUT=out_folder)
    limit = _limit(sparsity, plan_file, params=params, fit=fit, max_ppl=max_ppl, speedup=speedup)
    shares = _numbers(sparsity) if sparsity is not None else []
    chosen = _recipe(
        recipe,
        plan_file,
        sparsity=shares[0] if shares else None,
        criterion=criterion,
        allocator=allocator,
        reconstruction=reconstruction,
        ridge=ridge,
        bias=bias,
        held_out=held_out,
        per_block=per_block,
        targets=_words(targets) or None,
        tensor_parallel=tensor_parallel,
        unit=unit,
        attention_share=attention_share,
        loss=loss,
        gradient_checkpointing=gradient_checkpointing,
        sites=_words(sites) or None,
        blocks=blocks,
        hidden=hidden,
        of=of,
        multiple_of=multiple_of,
        samples=samples,
        length=length,
        seed=seed,
        calibration="self-generated" if self_generated else None,
    )
    chosen = chosen.evened() if uniform else chosen
    access = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    sizes = [replace(chosen, sparsity=share) for share in shares] or [chosen]
    if dry_run:
        with _quiet():
            rows = [plan(model, size, plan=plan_file, limit=limit, **access) for size in sizes]
        _show_plans(rows, as_json)
        return
    budget = shares if len(shares) > 1 else sparsity and shares[0]
    err.print(
        f"recipe: {json.dumps({**chosen.to_dict(), 'sparsity': budget} if plan_file is None else str(plan_file))}"
    )
    if calibrated is not None and len(shares) > 1:
        raise RecipeError("several sizes look at the model once by themselves: give --calibrated with one sparsity")
    if stream and len(shares) > 1:
        raise RecipeError("--stream makes one size at a time: give one sparsity")
    streaming: dict[str, Any] = {"stream": stream, "scratch": scratch, "scratch_dtype": scratch_dtype}
    streaming |= {"statistics_dtype": statistics_dtype, "tell": err.print}
    told: list[str] = []

    def announce(notes: Sequence[str]) -> None:
        told.extend(notes)
        _notes(notes)

    options: dict[str, Any] = {
        "recipe": chosen,
        "text": text,
        "journal": journal,
        "dtype": dtype,
        "device": device,
        "compute_dtype": compute_dtype,
        "force": force,
        "announce": announce,
        **access,
    }
    with _quiet(), _progress() as progress, _deterministic(deterministic):
        if len(sizes) == 1:
            one = {"calibrated": calibrated, "plan": plan_file, "limit": limit, "held_out_text": held_out_text}
            one |= streaming
            reports = {out_folder: run(model, out_folder, progress=progress, **one, **options)}
        else:
            reports = run_sizes(model, out_folder, shares, progress=progress, **options)
    _show_reports(reports, as_json, told)


def _limit(sparsity: str | None, plan_file: Path | None, **said: str | None) -> Any:
    """The budget in other units than sparsity, if that is what was given."""
    from .errors import BudgetError
    from .limits import check_one, limit_of

    given = {"sparsity": sparsity, "plan": plan_file, **said}
    check_one({name: value for name, value in given.items() if value is not None})
    if all(value is None for value in given.values()):
        others = ", ".join(f"--{name.replace('_', '-')}" for name in given if name != "sparsity")
        raise BudgetError(f"no budget is given: say how much is to go, as in --sparsity 0.2, or use one of {others}.")
    return limit_of(**said)


def _recipe(name: str | None, plan_file: Path | None, **overrides: Any) -> Any:
    """The recipe named, with what the user replaced in it; that of a plan cannot be replaced here."""
    from .errors import RecipeError
    from .recipe import Recipe

    replaced = [option for option, value in {"recipe": name, **overrides}.items() if value is not None]
    if plan_file is not None and replaced:
        named = ", ".join(f"--{option.replace('_', '-')}" for option in replaced)
        raise RecipeError(f"{plan_file} holds its recipe, so {named} cannot be said here: edit it there.")
    return Recipe.load(name or "goa-budget", **overrides)


def _numbers(text: str) -> list[float]:
    """The numbers of a comma-separated list, ascending."""
    from .errors import BudgetError

    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise BudgetError(f"sparsity must be a number, or several with commas, got {text!r}") from None


def _show_reports(reports: Mapping[Path, Any], as_json: bool, told: Sequence[str] = ()) -> None:
    """What was written, per folder, and what a user must know and was not told before; by the process that wrote it."""
    from .distributed import is_writer

    if not is_writer():
        return
    found = []
    for folder, report in reports.items():
        written = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
        found.append({**written, "seconds": report.seconds, "out": str(folder)})
        if as_json:
            continue
        _notes([note for note in written["notes"] if note not in told])
        sizes = written["parameters"]
        out.print(
            f"{sizes['before']:,} -> {sizes['after']:,} parameters: {sizes['share_of_blocks']:.2%} of the blocks, "
            f"{sizes['share_of_model']:.2%} of the model, in {report.seconds:.0f} s"
        )
        out.print(f"{folder}: loaded in a fresh process, same logits. {_how_to_load(written['loader'], folder)}")
    if as_json:
        _print_json(found if len(found) > 1 else found[0])


def _given(**values: Any) -> list[Any]:
    """The values of arguments that are needed unless work is resumed."""
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise typer.BadParameter(f"missing {', '.join(missing)} (or --resume OUT alone)")
    return list(values.values())


def _resume(folder: Path, command: str, model: str | None, as_json: bool = False) -> None:
    """Go on with interrupted work, about which nothing else may be said."""
    from .resuming import resume as run

    named = {word.split("=")[0] for word in sys.argv if word.startswith("-")}
    others = sorted(named - {"--resume", "--json", "--debug"}) + ([model] if model is not None else [])
    if others:
        raise typer.BadParameter(f"--resume takes all from the interrupted run: leave out {', '.join(others)}")
    with _quiet(), _progress() as progress:
        reports = run(folder, command=command, tell=err.print, progress=progress)
    if reports:
        _show_reports(reports, as_json)
    else:
        out.print(f"{folder}: finished")


@app.command()
def plan(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")] = None,
    out_file: Annotated[Path | None, typer.Argument(metavar="[PLAN.json]", help="File to write, for editing.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of the prunable parameters to remove.")] = None,
    params: Params = None,
    fit: Fit = None,
    speedup: Faster = None,
    edited: Annotated[Path | None, typer.Option("--plan", help="Show this plan, edited or not.")] = None,
    diff: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Show where two plans differ; no model is needed.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or .toml file; goa-budget by default.")] = None,
    text: Text = None,
    calibrated: Annotated[Path | None, typer.Option(help="Folder of prunelm calibrate, to skip that pass.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of a text, for cache and operations.", min=1)] = 8192,
    per_block: Annotated[bool | None, typer.Option(help="Widths may differ between blocks.")] = None,
    uniform: Annotated[bool, typer.Option("--uniform", help="The same widths in every block.")] = False,
    allocator: Annotated[str | None, typer.Option(help="Replace the recipe's allocator.")] = None,
    targets: Targets = None,
    tensor_parallel: Parallel = None,
    unit: Annotated[str | None, typer.Option(help="A unit of attention: group or query.")] = None,
    sites: Annotated[str | None, typer.Option(help="attention, ffn, or attention,ffn.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks that may lose units, as in 4:-2.")] = None,
    hidden: Annotated[float | None, typer.Option(help="Share of the residual stream's channels to remove.")] = None,
    multiple_of: Annotated[int | None, typer.Option(help="Kept FFN channels are a multiple of this.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")] = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace PLAN.json if it exists.")] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Show what a budget would leave of every block, and write that as a file for prune --plan."""
    from .errors import CheckpointError
    from .planning import plan as run

    if diff is not None:
        _show_difference(diff, as_json)
        return
    if model is None:
        raise CheckpointError("no model is named: prunelm plan MODEL, or prunelm plan --diff A.json B.json.")
    limit = _limit(None if sparsity is None else str(sparsity), edited, params=params, fit=fit, speedup=speedup)
    overrides: dict[str, Any] = {
        "per_block": per_block,
        "allocator": allocator,
        "unit": unit,
        "blocks": blocks,
        "hidden": hidden,
    }
    overrides |= {"targets": _words(targets) or None, "tensor_parallel": tensor_parallel}
    overrides |= {"multiple_of": multiple_of, "samples": samples, "length": length, "sparsity": sparsity}
    chosen = _recipe(recipe, edited, sites=_words(sites) or None, **overrides)
    with _quiet(), _progress() as progress:
        found = run(
            model,
            out_file,
            recipe=chosen.evened() if uniform else chosen,
            text=text,
            calibrated=calibrated,
            edited=edited,
            limit=limit,
            context=context,
            device=device,
            force=force,
            progress=progress,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    if as_json:
        _print_json({**vars(found), "recipe": found.recipe.to_dict()})
        return
    out.print(_outline_table(found.rows, found.context), soft_wrap=False)
    _notes(found.notes)
    size = found.size
    out.print(
        f"{size['parameters']:,} parameters stay: {size['share_of_blocks']:.2%} of the blocks and "
        f"{size['share_of_model']:.2%} of the model would go"
    )
    if out_file is not None:
        out.print(f"{out_file}: written. Edit it, and apply it: prunelm prune {model} OUT --plan {out_file}")


def _outline_table(rows: Sequence[dict[str, Any]], context: int) -> Table:
    kinds = list(dict.fromkeys(name for row in rows for name in row["units"]))
    forms = list(rows[0]["bytes"])
    table = Table("block", *kinds, "parameters", *(f"{form} bytes" for form in forms))
    for title in (f"cache at {context:,}", "MFLOPs a token", "predicted KL"):
        table.add_column(title)
    for row in rows:
        units = (
            f"{row['units'][kind][0]:,}/{row['units'][kind][1]:,}" if kind in row["units"] else "" for kind in kinds
        )
        sizes = (f"{row['bytes'][form]:,}" for form in forms)
        expected = "" if row["kl"] is None else f"{row['kl']:.4f}"
        cost = (f"{row['cache']:,}", f"{row['flops'] / 1e6:,.1f}", expected)
        table.add_row(row["block"], *units, f"{row['parameters']:,}", *sizes, *cost)
    return table


def _show_difference(paths: tuple[Path, Path], as_json: bool) -> None:
    """Where two plans differ, site by site."""
    from .plan_file import PlanFile, differences

    rows = differences(*(PlanFile(path) for path in paths))
    if as_json:
        _print_json(rows)
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


@app.command()
def calibrate(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")] = None,
    out_folder: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder to write.")] = None,
    resume: Resume = None,
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml file.")] = "best",
    sparsity: Annotated[float, typer.Option(help="Size at which budgets are searched.")] = 0.3,
    text: Text = None,
    journal: Annotated[Path | None, typer.Option(help="File that lets an interrupted search go on.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")] = None,
    multiple_of: Annotated[int | None, typer.Option(help="Kept FFN channels are a multiple of this.")] = None,
    seed: Annotated[int | None, typer.Option(help="For everything random.")] = None,
    device: Device = None,
    compute_dtype: ComputeDtype = "float32",
    deterministic: Deterministic = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Look at MODEL once, and save what prunes to any size need of it."""
    from .recipe import Recipe
    from .workflow import calibrate as run

    if resume is not None:
        _resume(resume, "calibrate", model)
        return
    model, out_folder = _given(MODEL=model, OUT=out_folder)
    chosen = Recipe.load(recipe, sparsity=sparsity, samples=samples, length=length, multiple_of=multiple_of, seed=seed)
    err.print(f"recipe: {json.dumps(chosen.to_dict())}")
    with _quiet(), _progress() as progress, _deterministic(deterministic):
        found = run(
            model,
            out_folder,
            recipe=chosen,
            text=text,
            journal=journal,
            device=device,
            compute_dtype=compute_dtype,
            force=force,
            progress=progress,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    _notes(found.notes)
    out.print(f"{out_folder}: what was seen of {len(found.survey.scores)} sites. Use it: prunelm prune --calibrated")


@app.command()
def repair(
    dense: Annotated[str, typer.Argument(help="The model that was pruned.")],
    pruned: Annotated[str, typer.Argument(help="What was made of it.")],
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    text: Annotated[Path, typer.Option(help="Text file, .jsonl with a text field, or folder of them.")],
    reconstruction: Annotated[str, typer.Option(help="Which repair.")] = "least-squares",
    samples: Annotated[int, typer.Option(help="Calibration sequences.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens in a calibration sequence.", min=8)] = 512,
    seed: Annotated[int, typer.Option(help="For everything random.")] = 0,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Solve the weights of somebody's pruned model again, so that they make up for what was removed."""
    from .workflow import repair as run

    with _quiet(), _progress() as progress:
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
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    _show_reports({out_folder: report}, as_json)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text that was not used for calibration.")],
    against: Annotated[str | None, typer.Option(help="The dense model, for everything that is paired.")] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="Parts to measure, as in quality,speed; or all. See prunelm list parts."),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="File for the results, as in OUT/evaluation.json; goes on with it."),
    ] = None,
    length: Length = 1024,
    max_tokens: MaxTokens = None,
    batch_size: Annotated[int, typer.Option(help="Windows that go through a model at once.", min=1)] = 1,
    tasks: Annotated[str | None, typer.Option(help="Names of lm-eval tasks, with commas.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First rows of each task only.", min=1)] = None,
    others: Annotated[str | None, typer.Option(help="Texts of other kinds, with commas, for part shift.")] = None,
    seed: Annotated[int, typer.Option(help="For everything random.")] = 0,
    device: Device = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure perplexity, bits per byte, and agreement with the dense model; with --parts much more."""
    from .workflow import evaluate as run

    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "seed": seed}
    if any(given is not None for given in (parts, out_file, tasks, others)):
        lists = {"tasks": tasks, "others": others}
        suite = {"batch_size": batch_size, "include_path": include_path, "limit": limit, **lists}
        _evaluate_parts(model, text, against, parts, out_file, {**sizes, **suite}, as_json, access)
        return
    with _quiet(), _progress() as progress:
        found = run(model, text, against=against, progress=progress, **sizes, **access)
    if as_json:
        _print_json(found.to_dict())
        return
    table = Table("measure", "value")
    for name, value in _quality(found.to_dict()):
        table.add_row(name, value)
    for name in ("tokens", "sequences", "length", "tokenizer", "text"):
        table.add_row(name, f"{found.facts.get(name)}")
    out.print(table, soft_wrap=False)


def _evaluate_parts(
    model: str,
    text: Path,
    against: str | None,
    parts: str | None,
    out_file: Path | None,
    setting: dict[str, Any],
    as_json: bool,
    access: dict[str, Any],
) -> None:
    """Run the suite and show what it found."""
    from .forms import damage_answered
    from .suite import Setting
    from .suite.measuring import measure
    from .suite.summary import notes, summary

    lists: dict[str, Any] = {name: tuple(_words(setting.pop(name))) for name in ("tasks", "others")}
    place = setting.pop("include_path")
    names = _words(parts) or ["quality"]
    asked = [name for name, given in {"tasks": lists["tasks"], "shift": lists["others"]}.items() if given]
    names += [name for name in asked if name not in names and names != ["all"]]
    chosen = Setting(include_path=str(place) if place else None, **lists, **setting)
    with _quiet(), _progress() as progress:
        found = measure(
            model, text, against=against, parts=names, out=out_file, setting=chosen, progress=progress, **access
        )
    with damage_answered(out_file or "the evaluation"):
        said, rows = notes(found), summary(found)
    _notes(said)
    if as_json:
        _print_json(found)
        return
    table = Table("", *(["dense"] if found["against"] else []), "model", "compared")
    for row in rows:
        table.add_row(*(row if found["against"] else (row[0], *row[2:])))
    out.print(table, soft_wrap=False)
    if out_file is not None:
        out.print(f"{out_file}: written. A page to look at: prunelm report {out_file.parent}")


def _words(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in text.split(",")] if text else []


@app.command()
def compare(
    dense: Annotated[str, typer.Argument(help="The dense model.")],
    pruned: Annotated[list[str], typer.Argument(help="Pruned models.")],
    text: Text = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="Write the page of prunelm report here too.")] = None,
    length: Length = 1024,
    max_tokens: MaxTokens = None,
    quantized: Annotated[
        str | None, typer.Option(help="Formats to round all weights to, as in q8_0,q5_0,q4_0, and compare by bytes.")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Put models side by side: size, quality, speed."""
    from .workflow import compare as run

    if out_file is not None:
        from .report.gathering import gather

        for name in pruned:
            gather(Path(name))
    with _quiet(), _progress() as progress:
        rows = run(
            [dense, *pruned],
            text,
            length=length,
            max_tokens=max_tokens,
            quantized=_words(quantized),
            progress=progress,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
        )
    if out_file is not None:
        from .report.comparing import write_comparison

        windows = {"length": length, "max_tokens": max_tokens, "dtype": "float32"}
        written = write_comparison(rows, pruned, text, windows, out_file)
        err.print(f"{written}: written. Open it in a browser.")
    if as_json:
        _print_json(rows)
        return
    out.print(comparison_table(rows), soft_wrap=False)
    if quantized is not None:
        out.print(quantized_table(rows), soft_wrap=False)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="criteria, allocators, reconstructions, architectures, recipes, parts.")],
    as_json: AsJson = False,
) -> None:
    """List plug-ins and recipes with one line each."""
    from .errors import UnknownPluginError
    from .registry import did_you_mean

    with _quiet():
        rows = _listing().get(what)
        if rows is None:
            known = list(_listing())
            raise UnknownPluginError(
                f"nothing is called {what!r}. {did_you_mean(what, known)}Known: {', '.join(known)}."
            )
        if as_json:
            _print_json([{"name": name, "summary": line, "origin": origin} for name, line, origin in rows()])
            return
        table = Table("name", "what it is", "from")
        for row in rows():
            table.add_row(*row)
    out.print(table, soft_wrap=False)


@app.command()
def demo(
    out_folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")] = Path("smollm2-pruned"),
    sparsity: Annotated[float, typer.Option(help="Share of the prunable parameters to remove.")] = 0.2,
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml file.")] = "goa-budget",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Prune a real pretrained Llama-type model from PyPI and show what it cost."""
    from .demo import run

    with _quiet(), _progress() as progress:
        result = run(out_folder, sparsity=sparsity, recipe=recipe, force=force, progress=progress)
    out.print(comparison_table(result.rows), soft_wrap=False)
    out.print(f"\nPrompt: {result.prompt!r}")
    for name, continuation in result.continuations.items():
        out.print(f"\n{name}: {continuation}")
    out.print(f"\nThe pruned model is in {out_folder}. {_how_to_load(result.loader, out_folder)}")


@app.command()
def export(
    model: Model,
    out_path: Annotated[Path, typer.Argument(metavar="OUT", help="File that ends in .gguf, or folder, to write.")],
    format_: Annotated[
        str | None,
        typer.Option("--format", help="gguf, nemotron-nas, onnx, padded or torchao-int8; else by OUT's ending."),
    ] = None,
    type_: Annotated[
        str | None, typer.Option("--type", help="Of the matrices in a .gguf file: f32, f16, bf16, q8_0 or q4_0.")
    ] = None,
    parent: Annotated[
        Path | None, typer.Option(help="The dense model's .gguf file, for its vocabulary and metadata.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write MODEL for another program: llama.cpp (.gguf), vLLM's DeciLM, ONNX, torchao, or padded with zeros."""
    from .exporting import export as run

    with _quiet():
        found = run(model, out_path, format=format_, type=type_, parent=parent, force=force)
    _notes(found.notes)
    if as_json:
        _print_json({**vars(found), "path": str(found.path)})
        return
    out.print(f"{out_path}: {found.architecture}, {found.type}, {found.bytes:,} bytes, {found.proof}")


@app.command()
def finalize(
    folder: Annotated[Path, typer.Argument(help="Folder that another program saved again; changed in place.")],
    like: Annotated[Path | None, typer.Option(help="The folder that the other program read.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put back what another program dropped from FOLDER: legacy rotary keys, dtypes, widths per block."""
    from .finalizing import finalize as run

    with _quiet():
        found = run(folder, like=like)
    if as_json:
        _print_json(found)
        return
    out.print(f"{folder}: put back {', '.join(found)}" if found else f"{folder}: nothing was missing")


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders that prune wrote, or a folder of them.")
    ],
    out_file: Annotated[Path | None, typer.Option("--out", help="File; report.html in the first folder.")] = None,
) -> None:
    """Write one HTML page that shows what pruning did: no network, opens from a file."""
    from .report import write_report

    with _quiet():
        written = write_report(folders, out_file)
    out.print(f"{written}: written. Open it in a browser.")


@app.command()
def transfer(
    model: Model,
    texts: Annotated[list[Path], typer.Argument(help="At least two texts; each is split into two parts.")],
    sparsity: Annotated[float, typer.Option(help="Share of the prunable parameters to remove, in (0, 1).")],
    recipe: Annotated[str, typer.Option(help="Recipe name or .toml file.")] = "goa-budget",
    out_file: Annotated[Path | None, typer.Option("--out", help="File for the results; goes on with it.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    calibration_length: Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")] = None,
    length: Length = 1024,
    max_tokens: MaxTokens = None,
    seed: Annotated[int | None, typer.Option(help="For everything random.")] = None,
    device: Device = None,
    as_json: AsJson = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL with a part of each text and test it on the other part of every text."""
    from .recipe import Recipe
    from .text_matrix import transfer as run

    chosen = Recipe.load(recipe, sparsity=sparsity, samples=samples, length=calibration_length, seed=seed)
    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens}
    with _quiet(), _progress() as progress:
        found = run(model, texts, recipe=chosen, out=out_file, progress=progress, **sizes, **access)
    if as_json:
        _print_json(found)
        return
    names = list(dict.fromkeys(cell["tested"] for cell in found["cells"]))
    table = Table("calibrated on", *(f"tested on {name}" for name in names))
    cells = {(cell["calibrated"], cell["tested"]): cell for cell in found["cells"]}
    table.add_row("dense", *(f"{cells[names[0], name]['dense']['value']:.4g}" for name in names))
    for name in names:
        table.add_row(name, *(_transferred(cells[name, other]) for other in names))
    out.print(table, soft_wrap=False)


def _transferred(cell: dict[str, Any]) -> str:
    ratio = cell["ratio"]
    seen = " (text overlaps)" if cell["overlap"] and cell["overlap"]["flagged"] else ""
    return f"{cell['value']:.4g}, {ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f}){seen}"


def comparison_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Measures down, models across, the first being the dense one."""
    table = Table("", *(Path(row["model"]).name for row in rows))
    table.add_row("parameters", *(f"{row['parameters']:,}" for row in rows))
    table.add_row("bytes on disk", *(f"{row['bytes']:,}" for row in rows))
    table.add_row("as float16", *(f"{2 * row['parameters']:,}" for row in rows))
    quality = [dict(_quality(row["evaluation"])) if "evaluation" in row else {} for row in rows]
    for name in dict.fromkeys(name for measures in quality for name in measures):
        table.add_row(name, *(measures.get(name, "") for measures in quality))
    if any("tokens_per_second" in row for row in rows):
        speeds = (f"{row['tokens_per_second']:,.0f} ({row['speedup']:.2f}x)" for row in rows)
        table.add_row("prefill tokens/s", *speeds)
    return table


def quantized_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Every model in every format, by bytes, beside what the dense model has in as many."""
    from .quantizing import at_equal_bytes

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
        table.add_row(*cells, f"{form['value']:.4g} +- {form['error']:.2g}", *beside)
    return table


def _quality(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if found["value"] is not None:
        rows.append((found["metric"], f"{found['value']:.4g} +- {found['error']:.2g}"))
    for name, label, form in (
        ("bits_per_byte", "bits per byte", "{:.4f}"),
        ("kl", "KL to dense", "{:.4f}"),
        ("top1", "same top token", "{:.1%}"),
        ("cosine", "cosine to dense", "{:.4f}"),
    ):
        if found[name] is not None:
            rows.append((label, form.format(found[name])))
    return rows


def _planned(row: dict[str, Any]) -> tuple[str, str, str, str]:
    kept = ", ".join(
        f"{name} {widths[0]}" + (f" to {widths[-1]}" if widths[1:] else "") for name, widths in row["kept"].items()
    )
    shares = (f"{row['share_of_blocks']:.2%}", f"{row['share_of_model']:.2%}")
    return f"{row['parameters']:,}", *shares, kept or "decided by measurements"


def _show_plans(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        _print_json(list(rows) if len(rows) > 1 else rows[0])
        return
    table = Table("parameters after", "of the blocks", "of the model", "kept per block")
    for row in rows:
        table.add_row(*_planned(row))
    out.print(table, soft_wrap=False)
    _notes([note for row in rows for note in row["notes"]])
    out.print("Nothing was written (--dry-run).")


def _notes(notes: Sequence[str]) -> None:
    for note in dict.fromkeys(notes):
        err.print(f"note: {note}")


def _how_to_load(loader: str, folder: Path) -> str:
    if loader == "transformers":
        return f"Load it: AutoModelForCausalLM.from_pretrained({str(folder)!r}), or the class its config names."
    if not list(folder.glob("modeling_*.py")):
        return f"No stock class has its shapes: prunelm.load({str(folder)!r})."
    return (
        f"Its blocks differ: prunelm.load({str(folder)!r}), or from_pretrained with trust_remote_code=True, which runs "
        "the modeling file in that folder."
    )


def _suite_parts() -> list[tuple[str, str, str]]:
    from .suite import parts

    return [(name, part.summary, "prunelm") for name, part in parts().items()]


def _listing() -> dict[str, Any]:
    from .allocators import ALLOCATORS
    from .architectures import ARCHITECTURES
    from .criteria import CRITERIA
    from .recipe import recipe_summaries
    from .reconstructions import RECONSTRUCTIONS

    return {
        "parts": _suite_parts,
        "criteria": CRITERIA.describe,
        "allocators": ALLOCATORS.describe,
        "reconstructions": RECONSTRUCTIONS.describe,
        "architectures": ARCHITECTURES.describe,
        "recipes": recipe_summaries,
    }


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' own bars and warnings stay off: errors are ours to explain."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    from .placement import deterministic

    with deterministic(wanted):
        yield


@contextlib.contextmanager
def _progress() -> Iterator[Any]:
    """A function (stage, done, total) that draws a bar on stderr, or nothing without a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, disable=not err.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield tell


class _Interrupted(BaseException):
    """Ctrl-C or another signal, under a name that the command-line library does not answer by itself."""


def _terminated(signum: int, _frame: Any) -> NoReturn:
    """Leave once; further signals of these kinds do not disturb the cleaning up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise _Interrupted(signum)


def _fail(line: str, status: int) -> NoReturn:
    """Say why, as far as anybody hears it, and leave."""
    with contextlib.suppress(OSError):
        err.print(f"error: {line}")
    sys.exit(status)


def _nowhere() -> Any:
    """A stream for what nobody reads."""
    return open(os.devnull, "w", encoding="utf-8")


def _run() -> None:
    """The command, by all processes that `torchrun` started; what they cannot share is left to the first."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        app(prog_name="prunelm")
        return
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ["RANK"] != "0":
        out.quiet = err.quiet = True
        sys.stdout = _nowhere()
    if command not in SHARED:
        if os.environ["RANK"] == "0":
            app(prog_name="prunelm")
        return
    from .distributed import give_reason, together

    with together():
        try:
            app(prog_name="prunelm")
        except PruneLMError as error:
            give_reason(str(error))
            raise


def main() -> None:
    """Run the command line; errors that are answers to the user are one line and exit 1."""
    # These are read when the libraries are imported, which happens inside the commands.
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for number in SIGNALS:
        # A program started by nohup, or in the background, is told to ignore some.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminated)
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except PruneLMError as error:
        if "--debug" in sys.argv:
            raise
        _fail(" ".join([str(error), *getattr(error, "__notes__", [])]), 1)
    except _Interrupted as stop:
        name = signal.Signals(stop.args[0]).name
        how = "interrupted" if name == "SIGINT" else f"ended by {name}"
        kept = " ".join(getattr(stop, "__notes__", []))
        _fail(f"{how}; {kept or 'nothing was left half-written'}", 128 + stop.args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        where = error.filename or "the output cannot be written"
        _fail(f"{where}: {error.strerror or error}", 1)
