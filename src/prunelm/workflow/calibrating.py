"""Look at a model once, for any number of prunes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..allocation import Outlook, look_at
from ..calibration import save_calibration
from ..data import Batches
from ..distributed import is_writer, shared_by
from ..job import prepare_
from ..memory import within_memory
from ..progress import Progress, silent
from ..recipe import Recipe
from ..repetition import repetition_notes
from ..workbench import workbench
from ..writing import writes
from . import DEFAULT_RECIPE
from .files import check_no_hidden, files_of_run, journal_of, recipe_or_default


@writes
def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    text: str | Path | None = None,
    journal: str | Path | None = None,
    device: str | None = None,
    compute_dtype: str = "float32",
    force: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Outlook:
    """Look at a dense model once and save what was seen, for any number of prunes to any size.

    A later `prune(..., calibrated=out)` takes its recipe from there, ranks units and divides its budget by it without a
    pass over the dense model; only repairs read text again. A search for budgets, where the recipe has one, is made at
    the recipe's sparsity.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    chosen = recipe_or_default(recipe, **overrides)
    access = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    check_no_hidden(chosen, "a saved calibration, which serves any size")
    files = files_of_run(model, [chosen], [Path(out)], text, None, force, access, compute_dtype, edited=True)
    with workbench(out, files.task([chosen], journal), command="calibrate", force=force) as bench:

        def seen(batch_tokens: int) -> tuple[Outlook, Batches]:
            dense, part = files.load(), bench.part(f"batches-of-{batch_tokens}")
            batches, refit = files.read(dense, chosen, batch_tokens, part, otherwise="")
            part.check(files.inputs(batches, refit))
            kept = journal_of(journal, files.source, [chosen], batches)
            found, *_ = look_at(dense, batches, chosen, prepare_(dense, chosen), progress, kept, part, refit)
            return found, batches

        (outlook, batches), notes = within_memory(seen, files.source.device, chosen.length, progress)
        outlook = replace(outlook, notes=[*outlook.notes, *repetition_notes(batches.facts), *notes, *shared_by()])
        if is_writer():
            made: dict[str, Any] = {"source": files.source, "recipe": chosen, "text": batches.facts}
            save_calibration(outlook, out, **made, compute_dtype=files.compute_dtype, force=force)
    return outlook
