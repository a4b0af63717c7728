"""Write the pages that the program itself knows best: docs/cli.md and docs/plugins.md.

`python docs/generate.py` writes them; `python docs/generate.py --check` exits 1 and names those that are stale.
"""

import dataclasses
import inspect
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
WIDTH = 100
NOTICE = "<!-- Written by docs/generate.py. Change the program and run `make docs`; do not edit this page. -->"
HELP_ENVIRONMENT = {
    "TERMINAL_WIDTH": str(WIDTH),
    "COLUMNS": str(WIDTH),
    "NO_COLOR": "1",
    "_TYPER_FORCE_DISABLE_TERMINAL": "1",
}


def cli_page() -> str:
    """The --help text of the program and of every command, as a page."""
    os.environ |= HELP_ENVIRONMENT  # read by typer when it is imported
    import typer.main
    from typer.testing import CliRunner

    from prunelm.cli import app

    names = list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    parts = ["# Command line", "", NOTICE, "", _PROSE, ""]
    for words in ([], *([name] for name in names)):
        shown = CliRunner().invoke(app, [*words, "--help"], prog_name="prunelm")
        if shown.exit_code:
            raise RuntimeError(f"prunelm {' '.join(words)} --help failed: {shown.output}")
        lines = [line.rstrip() for line in shown.output.strip("\n").splitlines()]
        while lines and not lines[0]:
            del lines[0]
        parts += [f"## {' '.join(['prunelm', *words])}", "", "```text", *lines, "```", ""]
    return "\n".join(parts)


_PROSE = """Results go to stdout; progress, notes and errors go to stderr. The exit code is 0 when the command did its
work, 1 when it could not (one line says why and what to do), 2 when the command line itself is wrong, and 128 plus the
number of the signal that ended it: 130 after Ctrl-C, 143 after SIGTERM. `prunelm --debug COMMAND ...` shows the
traceback of an error.

Files and folders appear whole or not at all, under their names only when all of them is on the disk. While a command
writes to OUT, `.OUT.lock` beside it names the process, and another command that would write there is refused.
`.OUT.partial` is what is being written; a killed command leaves both, and the next one into OUT clears them."""


def plugins_page() -> str:
    """Every plug-in and recipe that comes with PruneLM, as a page."""
    from prunelm.allocators import ALLOCATORS
    from prunelm.architectures import ARCHITECTURES
    from prunelm.criteria import CRITERIA
    from prunelm.recipe import RECIPES, Recipe, recipe_summaries
    from prunelm.reconstructions import RECONSTRUCTIONS

    criteria = [
        (name, line, ", ".join(sorted(CRITERIA[name].needs())) or "nothing", _options(CRITERIA[name].score))
        for name, line, origin in CRITERIA.describe()
        if origin == "prunelm"
    ]
    parts = [
        "# Plug-ins and recipes",
        "",
        NOTICE,
        "",
        "Formulas, costs and sources are in [methods.md](methods.md). Your own plug-ins:",
        "[add-a-method.md](add-a-method.md) and [add-a-model.md](add-a-model.md).",
        "",
        "## Criteria",
        "",
        "`reads` is what calibration must measure for the criterion under its default options.",
        "",
        *_table(("name", "what it is", "reads", "options"), criteria),
    ]
    for title, registry in (
        ("Allocators", ALLOCATORS),
        ("Reconstructions", RECONSTRUCTIONS),
        ("Architectures", ARCHITECTURES),
    ):
        ours = [(name, line) for name, line, origin in registry.describe() if origin == "prunelm"]
        parts += ["", f"## {title}", "", *_table(("name", "what it is"), ours)]
    parts += ["", "## Recipes", "", *_table(("name", "what it is"), [row[:2] for row in recipe_summaries()])]
    for name, _, _ in recipe_summaries():
        source = (RECIPES / f"{name}.toml").read_text(encoding="utf-8").strip()
        parts += ["", f"### {name}", "", "```toml", source, "```"]
    defaults = [
        (f"`{f.name}`", "" if f.name in ("attention", "ffn") else f"`{getattr(Recipe(), f.name)!r}`")
        for f in dataclasses.fields(Recipe)
    ]
    _, _, attributes = (inspect.getdoc(Recipe) or "").partition("Attributes:\n")
    parts += ["", "## Recipe fields", "", "```text", inspect.cleandoc(attributes), "```", ""]
    parts += [*_table(("field", "default"), defaults), ""]
    return "\n".join(parts)


def _options(score: object) -> str:
    """The keyword-only parameters of a scoring function with their defaults."""
    parameters = inspect.signature(score).parameters.values()  # type: ignore[arg-type]
    shown = [f"`{p.name} = {p.default!r}`" for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return ", ".join(shown) or "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]


def stale(folder: Path, pages: dict[str, str]) -> list[str]:
    """Names of the pages whose file in the folder is missing or says something else."""
    found = {name: folder / name for name in pages}
    return [
        name
        for name, path in found.items()
        if not path.is_file() or path.read_text(encoding="utf-8").rstrip() != pages[name].rstrip()
    ]


def main(words: list[str]) -> int:
    """Exit code: 1 when `--check` finds a stale page, 2 for other words."""
    if words not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    pages = {"cli.md": cli_page(), "plugins.md": plugins_page()}
    old = stale(HERE, pages)
    if words:
        if old:
            print(f"stale: {', '.join(f'docs/{name}' for name in old)}. Run: make docs", file=sys.stderr)
        return int(bool(old))
    for name in old:
        (HERE / name).write_text(pages[name].rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
