"""`prunelm demo`."""

from pathlib import Path

from ..workflow import QUICK_RECIPE
from .console import out, progress_bars, quiet, tell
from .options import Folder, Force, RecipeName, Sparsity
from .tables import comparison_table, overlaps
from .written import how_to_load


def demo(
    out_folder: Folder = Path("smollm2-pruned"),
    sparsity: Sparsity = 0.2,
    recipe: RecipeName = QUICK_RECIPE,
    force: Force = False,
) -> None:
    """Prune a small pretrained model that comes from PyPI, and show what that cost."""
    from ..demo import run

    with quiet(), progress_bars() as progress:
        result = run(out_folder, sparsity=sparsity, recipe=recipe, force=force, progress=progress)
    tell(overlaps(result.rows))
    out.print(comparison_table(result.rows), soft_wrap=False)
    out.print(f"\nPrompt: {result.prompt!r}")
    for name, continuation in result.continuations.items():
        out.print(f"\n{name}: {continuation}")
    out.print(f"\nThe pruned model is in {out_folder}. {how_to_load(result.loader, out_folder)}")
