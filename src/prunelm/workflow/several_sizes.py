"""Prune a model to several sizes at once, a folder for each."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..distributed import agreed_data, is_writer, shared_by
from ..errors import BudgetError
from ..family import prune_family
from ..memory import smaller_batches, within_memory
from ..progress import Progress, silent
from ..pruning import Report
from ..recipe import Recipe
from ..workbench import goes_on, workbench
from ..writing import check_target, writes
from .files import Announce, check_no_hidden, files_of_run, journal_of, recipe_or_default, seen_before, silently


@writes
def prune_sizes(
    model: str | Path,
    out: str | Path,
    sparsities: Sequence[float],
    *,
    recipe: str | Path | Recipe | None = None,
    text: str | Path | None = None,
    calibrated: str | Path | None = None,
    journal: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compute_dtype: str = "float32",
    force: bool = False,
    progress: Progress = silent,
    announce: Announce = silently,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> dict[Path, Report]:
    """Nested models of several sizes, one folder each below `out`, from one look at the dense model.

    The folders are named after the sparsities, as in `OUT/0.2`, and written one by one, the largest model first; each
    opens and is proven as that of `prune` is. For the arguments see there.

    Raises:
        PruneLMError: one line that says what to do; folders that were finished before stay.
    """
    chosen = recipe_or_default(recipe, calibrated, sparsity=min(sparsities), **overrides)
    check_no_hidden(chosen, "several sizes at once, whose units are nested in the dense model")
    sizes = [replace(chosen, sparsity=sparsity) for sparsity in sorted(set(sparsities))]
    access = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    folders = [Path(out) / f"{size.sparsity:g}" for size in sizes]
    _check_apart(folders)
    check_target(out, force=True)
    seen = calibrated is not None
    # The folders that an interrupted run has finished are its own, and are written again.
    again = force or agreed_data(goes_on(out) if is_writer() else False)
    files = files_of_run(model, sizes, folders, text, dtype, again, access, compute_dtype, seen=seen)
    announce(files.notes)
    outlook = seen_before(calibrated, files, chosen, journal)
    reports: dict[Path, Report] = {}
    with workbench(out, files.task(sizes, journal, calibrated), command="prune", force=force) as bench:

        def written(batch_tokens: int) -> None:
            part = bench.part(f"batches-of-{batch_tokens}")
            calibration, refit = files.read(files.load(), chosen, batch_tokens, part)
            part.check(files.inputs(calibration, refit, calibrated))
            if is_writer():
                Path(out).mkdir(exist_ok=True)
            family = prune_family(
                files.load,
                calibration,
                chosen,
                [size.sparsity for size in sizes],
                refit=refit,
                outlook=outlook,
                journal=journal_of(journal, files.source, sizes, calibration),
                bench=part,
                progress=progress,
            )
            for folder, (pruned, report) in zip(folders, family, strict=True):
                report.asked["sparsities"] = [size.sparsity for size in sizes]
                if calibrated is not None:
                    report.asked["calibrated"] = Path(calibrated).name
                report.notes.extend([*smaller_batches(files.source.device, batch_tokens), *shared_by()])
                if is_writer():
                    replace(files, force=files.force or folder in reports).save(pruned, report, folder)
                reports[folder] = report

        within_memory(written, files.source.device, chosen.length, progress)
    return reports


def _check_apart(folders: Sequence[Path]) -> None:
    """Raise unless every size has a folder of its own.

    Raises:
        BudgetError: names the one that two would share.
    """
    twice = next((folder for folder, count in Counter(folders).items() if count > 1), None)
    if twice is not None:
        raise BudgetError(f"two sparsities would both be written to {twice}: let them differ in six digits.")
