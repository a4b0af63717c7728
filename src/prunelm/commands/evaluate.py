"""`prunelm evaluate`."""

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from rich.table import Table

from .asked import words
from .console import out, print_json, progress_bars, quiet, tell
from .options import Access, AsJson, Device, Length, MaxTokens, Model, Seed
from .tables import quality_rows


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The text that goes through a model."""

    length: Length = 1024
    max_tokens: MaxTokens = None


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What the parts of the suite want to know besides."""

    PANEL: ClassVar = "Parts of the evaluation"

    batch_size: Annotated[int, typer.Option(help="Windows that go through the model at once.", min=1)] = 1
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks for part tasks, separated by commas.")] = None
    include_path: Annotated[Path | None, typer.Option(help="Folder with lm-eval tasks of your own.")] = None
    limit: Annotated[int | None, typer.Option(help="Read only so many rows of each task.", min=1)] = None
    others: Annotated[str | None, typer.Option(help="Texts of other kinds for part shift, separated by commas.")] = None
    prompts: Annotated[int, typer.Option(help="Prompts that part generation continues.", min=1)] = 8
    new_tokens: Annotated[int, typer.Option(help="Tokens that it continues each prompt by.", min=1)] = 48
    rounds: Annotated[int, typer.Option(help="Rounds in which parts speed and widths measure.", min=1)] = 7
    pseudo_tokens: Annotated[int, typer.Option(help="Tokens that part pseudo-perplexity masks in turn.", min=1)] = 512

    def setting(self, **sizes: Any) -> dict[str, Any]:
        """The fields of a `prunelm.suite.Setting`."""
        lists = {name: tuple(words(getattr(self, name))) for name in ("tasks", "others")}
        place = str(self.include_path) if self.include_path else None
        names = ("batch_size", "limit", "prompts", "new_tokens", "rounds", "pseudo_tokens")
        return {**sizes, **{name: getattr(self, name) for name in names}, "include_path": place, **lists}


def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to measure on; not the one used for calibration.")],
    against: Annotated[str | None, typer.Option(help="The dense model, to compare with on the same text.")] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="What to measure, e.g. quality,speed, or all (prunelm list parts)."),
    ] = None,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out", help="File for the results, e.g. OUT/evaluation.json. If it exists, what is missing is added."
        ),
    ] = None,
    *,
    windows: Windows,
    suite: Suite,
    seed: Seed = 0,
    device: Device = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Hold only one block in memory at a time; without --parts.")
    ] = False,
    as_json: AsJson = False,
    access: Access,
) -> None:
    """Measure perplexity and agreement with the dense model; with --parts, much more."""
    from ..doubts import flags
    from ..errors import RecipeError
    from ..workflow.evaluating import evaluate as run

    sizes: dict[str, Any] = {**vars(windows), "seed": seed}
    options: dict[str, Any] = {"against": against, "device": device, **vars(access)}
    if any(given is not None for given in (parts, out_file, suite.tasks, suite.others)):
        if stream:
            raise RecipeError("--stream measures quality alone: leave --parts, --out, --tasks and --others out")
        _evaluate_parts(model, text, parts, out_file, suite.setting(**sizes), as_json, options)
        return
    _check_no_parts(suite)
    with ExitStack() as printed:
        with quiet(), progress_bars() as progress:
            found = run(model, text, stream=stream, progress=progress, until=printed, **sizes, **options)
        tell([*flags(text.name, found.facts.get("overlap"))])
        if as_json:
            print_json(found.to_dict())
            return
        table = Table("measure", "value")
        for name, value in quality_rows(found.to_dict()):
            table.add_row(name, value)
        for name in ("tokens", "sequences", "length", "tokenizer", "text"):
            table.add_row(name, f"{found.facts.get(name)}")
        out.print(table, soft_wrap=False)


def _check_no_parts(suite: Suite) -> None:
    """Raise if something is said of parts, and no part is asked for."""
    from ..errors import EvaluationError

    said = [name for name, value in vars(Suite()).items() if getattr(suite, name) != value]
    if said:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise EvaluationError(f"{named}: for parts of the suite, and none is asked for: say --parts quality, or all")


def _evaluate_parts(
    model: str,
    text: Path,
    parts: str | None,
    out_file: Path | None,
    setting: dict[str, Any],
    as_json: bool,
    options: dict[str, Any],
) -> None:
    """Run the suite and show what it found."""
    from ..doubts import notes
    from ..forms import damage_answered
    from ..loading import PLAN_FILE
    from ..suite import Setting
    from ..suite.measuring import FILE, measure
    from ..suite.summary import summary

    names = words(parts) or ["quality"]
    asked = [name for name, given in {"tasks": setting["tasks"], "shift": setting["others"]}.items() if given]
    names += [name for name in asked if name not in names and names != ["all"]]
    chosen = Setting(**setting)
    with quiet(), progress_bars() as progress:
        found = measure(model, text, parts=names, out=out_file, setting=chosen, progress=progress, **options)
    left_out = found.get("left_out", {})
    with damage_answered(out_file or "the evaluation"):
        said = [*notes(found), *(f"part {name} was left out: {why}" for name, why in left_out.items())]
        rows = summary(found)
    tell(said)
    if as_json:
        print_json(found)
        return
    table = Table("", *(["dense"] if found["against"] else []), "model", "compared")
    for row in rows:
        table.add_row(*(row if found["against"] else (row[0], *row[2:])))
    out.print(table, soft_wrap=False)
    if out_file is not None:
        shown = out_file.name == FILE and (out_file.parent / PLAN_FILE).is_file()
        page = f" A page to look at: prunelm report {shlex.quote(str(out_file.parent))}" if shown else ""
        out.print(f"{out_file}: written.{page}")
