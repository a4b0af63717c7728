"""The dry run: what a budget would leave of every block, as a table and as a file to edit."""

import shlex
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .allocation import Outlook, allocated, look_at
from .calibration import fingerprint, load_calibration
from .errors import BudgetError, DataError
from .job import first_channels_, prepare_
from .limits import Limit, MaxPerplexity
from .loading import Source, find_model, load_model, skeleton
from .outline import outline
from .own_work import workbench_until
from .plan_file import write_plan
from .progress import Progress, silent
from .recipe import Recipe
from .sized_pruning import sized_by
from .workbench import lasting
from .workflow import default_recipe
from .workflow.files import check_plan_alone, recipe_or_default
from .workflow.inspecting import planned
from .workflow.texts import check_reads, plain, read_batches
from .writing import check_file, writes


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan: the recipe with its sparsity, one row for each block and two for the rest and all, and what to know.

    `removed`, `parameters` and the shares are those of the whole plan; see `prunelm.outline.outline` for the rows.
    """

    recipe: Recipe
    rows: list[dict[str, Any]]
    context: int
    size: dict[str, Any]
    notes: list[str]


@writes
def plan(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    text: str | Path | None = None,
    calibrated: str | Path | None = None,
    edited: str | Path | None = None,
    limit: Limit | None = None,
    context: int = 8192,
    force: bool = False,
    device: str | None = None,
    progress: Progress = silent,
    until: ExitStack | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Planned:
    """What `prune` would leave of every block, without pruning; with `out`, a file that `prune(plan=...)` applies.

    Weights are read only where the recipe decides widths by looking at the model, which needs `text` or `calibrated`.

    Args:
        model, text, limit, device, progress, trust_remote_code, allow_pickle, overrides: see `prune`.
        recipe: see `prune`; by default its own default, or `obs` where there is nothing to look with.
        out: file to write.
        calibrated: a folder of `calibrate`, in place of looking.
        edited: a plan to show in place of making one.
        context: tokens in a text, for the cache and the operations.
        force: replace `out` if it exists.
        until: see `prunelm.evaluate`.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    check_plan_alone(edited, {"recipe": recipe, **overrides})
    chosen = recipe_or_default(recipe, calibrated, default=default_recipe(looks=text is not None), **overrides)
    if isinstance(limit, MaxPerplexity):
        raise BudgetError("--max-ppl is met by measuring pruned models: prunelm prune does that, a plan cannot.")
    if context < 1:
        raise BudgetError(f"context must be at least one token, got {context}")
    if out is not None:
        check_file(out, force=force)
    source = find_model(model, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle, device=device)
    size = sized_by(edited, limit, source, chosen, progress=progress)
    outlook = load_calibration(calibrated, source=source, recipe=size.recipe) if calibrated is not None else None
    if size.recipe.decides_by_looking and size.decided is None:
        outlook = outlook or _looked(source, size.recipe, text, out, force, until, progress)
        size = sized_by(edited, limit, source, chosen, outlook, progress)
    shapes = skeleton(source)
    counts = size.decided.counts if size.decided is not None else None
    job = prepare_(shapes, size.recipe, narrow_hidden=first_channels_, counts=counts)
    if job.counts is None and outlook is not None:
        job = allocated(job, size.recipe, outlook)
    if out is not None:
        write_plan(out, job, size.recipe, fingerprint(source), size.asked)
    rows = outline(shapes, job, context, outlook)
    notes = [*size.notes, *job.notes, *_price_note(rows, size.recipe, source.name)]
    return Planned(recipe=size.recipe, rows=rows, context=context, size=planned(shapes, job), notes=notes)


def _looked(
    source: Source,
    recipe: Recipe,
    text: str | Path | None,
    out: str | Path | None,
    force: bool,
    until: ExitStack | None,
    progress: Progress,
) -> Outlook:
    """What a look at the dense model shows; an interrupted one goes on.

    Raises:
        BudgetError: whole blocks go.
        DataError: there is no text to look with.
        ResumeError: the file has the unfinished work of another plan.
    """
    if recipe.drops_blocks:
        raise BudgetError(f"recipe {recipe.name!r} drops whole blocks, and a plan is of units: use another recipe.")
    if text is not None:
        check_reads(recipe)
    elif recipe.calibration == "text":
        raise DataError(
            f"recipe {recipe.name!r} decides widths by looking at the model: give --text FILE, or --calibrated FOLDER "
            "of prunelm calibrate."
        )
    model = load_model(source)
    batches, refit = read_batches(model, source, recipe, text)
    task = {"model": lasting(source.name), "recipe": recipe.to_dict(), "text": lasting(text), "device": source.where}
    task["inputs"] = {"model": fingerprint(source), "calibration": plain(batches.facts)}
    with workbench_until(until, out, task, command="plan", force=force) as bench:
        return look_at(model, batches, recipe, prepare_(model, recipe), progress, bench=bench, refit=refit)[0]


def _price_note(rows: list[dict[str, Any]], recipe: Recipe, name: str) -> list[str]:
    """How to get the divergence to expect, where it is not known."""
    if any(row["kl"] is not None for row in rows):
        return ["predicted KL counts every site as if it were the only one; together they mostly cost more"]
    name, size = shlex.quote(name), f"--sparsity {recipe.sparsity:g}"
    return [
        f"predicted KL: recipe {recipe.name!r} prices nothing. With prices: prunelm calibrate {name} SEEN --recipe "
        f"sensitivity --text FILE, then prunelm plan {name} --recipe sensitivity {size} --calibrated SEEN"
    ]
