"""Go on with work that was interrupted: everything that was asked is read from what it left."""

from pathlib import Path
from typing import Any

from .distributed import agreed_data, is_writer
from .errors import ResumeError
from .limits import limit_of
from .progress import Progress, silent
from .pruning import Report
from .recipe import Recipe
from .streaming import Tell, tell_nobody
from .workbench import forget, going_on, unfinished
from .workflow.calibrating import calibrate
from .workflow.one_size import prune
from .workflow.several_sizes import prune_sizes
from .writing import writes


@writes
def resume(
    out: str | Path, *, command: str = "prune", tell: Tell = tell_nobody, progress: Progress = silent
) -> dict[Path, Report]:
    """Finish an interrupted `prune`, `prune_sizes` or `calibrate` into `out`, with the bytes of an uninterrupted one.

    Finished blocks are read, and the calibration text runs through them once more; a search goes on from its last
    round. The number of threads is that of the first run, because sums depend on it.

    Args:
        out: that was to be written.
        command: `prune` or `calibrate`.
        tell: called with sentences to read before the work begins.
        progress: called with (stage, done, total).

    Returns:
        The report of each folder that was written; nothing where `out` was finished already, and after `calibrate`.

    Raises:
        ResumeError: there is no unfinished work of this command, or it is of other inputs or another version.
        PruneLMError: as for the command itself.
    """
    head = agreed_data(unfinished(out) if is_writer() else {})
    if head["command"] != command:
        raise ResumeError(f"{out} has the unfinished work of prunelm {head['command']}: use --resume of that command.")
    task = head["task"]
    sparsities = task.pop("sparsities")
    if head["stands"] and len(sparsities) == 1:
        if is_writer():
            forget(out)
        return {}
    if is_writer() and Path(out).exists() and len(sparsities) == 1 and not head["force"]:
        raise ResumeError(
            f"{out} exists, and is not what the unfinished work on it has made: move it away, or say --force with the "
            "whole command to replace it."
        )
    task["recipe"] = Recipe.from_dict(task["recipe"]) if task.get("plan") is None else None
    if "limit" in task:
        task["limit"] = limit_of(**task["limit"])
    options: dict[str, Any] = {**task, "force": head["force"] or len(sparsities) > 1, "progress": progress}
    with going_on():
        if command == "calibrate":
            calibrate(out=out, **_without(options, "calibrated", "dtype"))
            return {}
        if len(sparsities) > 1:
            return prune_sizes(out=out, sparsities=sparsities, **options)
        return {Path(out): prune(out=out, tell=tell, **options)}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
