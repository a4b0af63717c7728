"""One HTML file that shows what pruning did to a model: no network, works from file://, dark and light, printable."""

import functools
import html
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..forms import damage_answered
from ..writing import write_whole
from .content import content
from .gathering import Gathered, gather

FILE = "report.html"
HERE = Path(__file__).parent


Tell = Callable[[list[str]], None]


def write_report(
    folders: Sequence[str | Path], out: str | Path | None = None, *, tell: Tell = lambda _notes: None
) -> Path:
    """The page that was written: `report.html` in the first folder, or `out`.

    Args:
        folders: folders that `prune` wrote, or folders of them, as of `--sparsity 0.1,0.2`.
        out: file to write; an older one is replaced.
        tell: told which files were left out, since they are of other models.

    Raises:
        CheckpointError: a folder has no pruning.json, or a damaged file.
        OutputError: the page cannot be written.
    """
    with damage_answered(folders[0]):
        found = [subject for folder in folders for subject in gather(Path(folder))]
        tell([line for subject in found for line in subject.left_out])
        return write_page(found, Path(out) if out is not None else Path(folders[0]) / FILE)


def write_page(found: Sequence[Gathered], target: Path) -> Path:
    """The page of some models, written.

    Raises:
        OutputError: it cannot be.
    """
    write_whole(target, render(found))
    return target


def render(found: Sequence[Gathered]) -> str:
    """The page as text."""
    import jinja2

    shown = content(found)
    loader = jinja2.FileSystemLoader(HERE)
    made = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return made.get_template("page.html").render(
        **{**shown, "data": _embedded(shown["data"])},
        library=_library(),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        version=version("prunelm"),
        escape=html.escape,
    )


@functools.lru_cache(maxsize=1)
def _library() -> str:
    """The code that draws the figures, which takes a second to put together."""
    import vl_convert

    return str(vl_convert.javascript_bundle(snippet="window.vegaEmbed = vegaEmbed;"))


def _embedded(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it can end that element."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
