"""What the words of a command line ask for: lists, a budget, a recipe, or work that was interrupted."""

import sys
from pathlib import Path
from typing import Any

import typer

from ..workflow import default_recipe
from .console import err, out, print_json, progress_bars, quiet, tell
from .written import show_reports

_OPTIONS = {"targets": "for", "calibration": "self-generated"}
"""Options whose names are not those of the fields that they set."""


def words(text: str | None) -> list[str]:
    """The words of a comma-separated list."""
    return [word.strip() for word in text.split(",")] if text else []


def numbers(text: str) -> list[float]:
    """The numbers of a comma-separated list, ascending."""
    from ..errors import BudgetError

    try:
        return sorted({float(part) for part in text.split(",")})
    except ValueError:
        raise BudgetError(f"sparsity must be a number, or several with commas, got {text!r}") from None


def given(**values: Any) -> list[Any]:
    """The values of arguments that are needed unless work is resumed."""
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise typer.BadParameter(f"missing {', '.join(missing)} (or --resume OUT alone)")
    return list(values.values())


def limit_asked(sparsity: str | None, plan_file: Path | None, **said: str | None) -> Any:
    """The budget in other units than sparsity, if that is what was given."""
    from ..errors import BudgetError
    from ..limits import check_one, limit_of

    given = {"sparsity": sparsity, "plan": plan_file, **said}
    check_one({name: value for name, value in given.items() if value is not None})
    if all(value is None for value in given.values()):
        others = ", ".join(f"--{name.replace('_', '-')}" for name in given if name != "sparsity")
        raise BudgetError(f"no budget is given: say how much is to go, as in --sparsity 0.2, or use one of {others}.")
    return limit_of(**said)


def recipe_asked(
    name: str | None,
    plan_file: Path | None,
    *,
    uniform: bool,
    looks: bool = True,
    calibrated: Path | None = None,
    **overrides: Any,
) -> Any:
    """The recipe named, with what the user replaced in it; that of a plan cannot be replaced here.

    Lists among the overrides are still in one string; with `uniform`, blocks do not differ, and both kinds of site may
    lose units unless `sites` or a file says which. Without a name it is that of a saved calibration, or else the best
    that the other options leave: `best` where widths may differ, and `obs`, which makes no search, where the model
    cannot be looked at first (`looks`), or the allocator or attention's share is named.
    """
    from ..calibration import calibrated_recipe
    from ..recipe import Recipe
    from ..workflow.files import check_plan_alone

    overrides |= {name: words(overrides[name]) or None for name in ("targets", "sites")}
    said = {"recipe": name, **overrides, "uniform": uniform or None}
    check_plan_alone(plan_file, {_option(field, value): value for field, value in said.items()})
    if name is None and calibrated is not None and plan_file is None:
        chosen = calibrated_recipe(calibrated, **overrides)
        tell([f"recipe {chosen.name}, with which {calibrated} was made"])
        return chosen.evened(chosen.sites) if uniform else chosen
    if name is None:
        searches = looks and overrides.get("allocator") is None and overrides.get("attention_share") is None
        name = default_recipe(looks=searches, per_block=bool(overrides.get("per_block")))
    chosen = Recipe.load(name, **overrides)
    if not uniform:
        return chosen
    said_which = overrides["sites"] or name.endswith(".toml")
    return chosen.evened(chosen.sites) if said_which else chosen.evened()


def _option(field: str, value: Any) -> str:
    """The option that gives a field of a recipe this value, as it is typed."""
    words = _OPTIONS.get(field, field.replace("_", "-"))
    return f"--no-{words}" if value is False else f"--{words}"


def others_said(option: str, *arguments: Any) -> list[str]:
    """What the command line says beside an option that stands alone, but for --json and --debug."""
    named = {word.split("=")[0] for word in sys.argv if word.startswith("-")}
    return sorted(named - {option, "--json", "--debug"}) + [str(word) for word in arguments if word is not None]


def resumed(folder: Path, command: str, model: str | None, as_json: bool = False) -> None:
    """Go on with interrupted work, about which nothing else may be said."""
    from ..resuming import resume as run

    others = others_said("--resume", model)
    if others:
        raise typer.BadParameter(f"--resume takes all from the interrupted run: leave out {', '.join(others)}")
    with quiet(), progress_bars() as progress:
        reports = run(folder, command=command, tell=err.print, progress=progress)
    if reports:
        show_reports(reports, as_json)
    elif as_json:
        print_json({"out": str(folder), "finished": True})
    else:
        out.print(f"{folder}: finished")
