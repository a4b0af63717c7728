"""`prunelm list`."""

from typing import Annotated, Any

import typer
from rich.table import Table

from .console import out, print_json, quiet
from .options import AsJson


def list_(
    what: Annotated[
        str,
        typer.Argument(metavar="recipes|criteria|allocators|reconstructions|architectures|parts", help="What to list."),
    ],
    as_json: AsJson = False,
) -> None:
    """List the recipes or plug-ins that are installed, one line each."""
    from ..errors import UnknownPluginError
    from ..registry import did_you_mean

    with quiet():
        rows = _listing().get(what)
        if rows is None:
            known = list(_listing())
            raise UnknownPluginError(
                f"nothing is called {what!r}. {did_you_mean(what, known)}Known: {', '.join(known)}."
            )
        if as_json:
            print_json([{"name": name, "summary": line, "origin": origin} for name, line, origin in rows()])
            return
        table = Table("name", "what it is", "from")
        for row in rows():
            table.add_row(*row)
    out.print(table, soft_wrap=False)


def _suite_parts() -> list[tuple[str, str, str]]:
    from ..suite import parts

    return [(name, part.summary, "prunelm") for name, part in parts().items()]


def _listing() -> dict[str, Any]:
    from ..allocators import ALLOCATORS
    from ..architectures import ARCHITECTURES
    from ..criteria import CRITERIA
    from ..recipe import recipe_summaries
    from ..reconstructions import RECONSTRUCTIONS

    return {
        "parts": _suite_parts,
        "criteria": CRITERIA.describe,
        "allocators": ALLOCATORS.describe,
        "reconstructions": RECONSTRUCTIONS.describe,
        "architectures": ARCHITECTURES.describe,
        "recipes": recipe_summaries,
    }
