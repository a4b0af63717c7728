"""The page of a comparison: what was just measured, beside what a folder has of other measurements."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import Tell, write_page
from .gathering import gather

Row = Mapping[str, Any]


def write_comparison(
    rows: Sequence[Row],
    folders: Sequence[str],
    text: Path | None,
    windows: Mapping[str, Any],
    out: Path,
    *,
    tell: Tell = lambda _notes: None,
) -> Path:
    """The page of some pruned models, measured by `prunelm compare`; what was measured before is replaced by that.

    Args:
        rows: of `prunelm.compare`, the dense model first.
        folders: the pruned models, in the order of the other rows.
        text: that they were compared on.
        windows: settings that the quality hangs on.
        out: file to write.
        tell: told which files were left out, since they are of other models.

    Raises:
        CheckpointError: a folder has no pruning.json.
        OutputError: the page cannot be written.
    """
    found = []
    for folder, row in zip(folders, rows[1:], strict=True):
        for one in gather(Path(folder)):
            found.append(replace(one, evaluation=_evaluation(one.evaluation, rows[0], row, text, windows)))
    tell([line for one in found for line in one.left_out])
    return write_page(found, out)


def _evaluation(
    before: Row | None, dense: Row, row: Row, text: Path | None, windows: Mapping[str, Any]
) -> dict[str, Any]:
    """A comparison's row in the form of `evaluation.json`, with the other parts of an older one."""
    parts: dict[str, Any] = dict(before["parts"]) if before is not None else {}
    if "evaluation" in row and text is not None:
        name = {"name": text.name}
        met = row["evaluation"]["facts"].get("overlap")
        found = {"settings": dict(windows), "text": name, "overlap": met, "results": _quality(dense, row)}
        parts["quality"] = {**found, "compared": True}
    if "speedup" in row:
        known = parts.get("speed", {}).get("results", {})
        ratio = {"value": row["speedup"], "low": None, "high": None}
        prefill = {"dense": dense["tokens_per_second"], "model": row["tokens_per_second"], "ratio": ratio}
        speeds = {who: {**known.get(who, {}), "prefill": value} for who, value in prefill.items()}
        parts["speed"] = {"settings": {}, "compared": True, "results": {**known, **speeds}}
    against = (before or {}).get("against") if text is None else None
    return {**(before or {}), "against": against or {"name": dense["model"]}, "parts": parts}


def _quality(dense: Row, row: Row) -> dict[str, Any]:
    found = {name: value for name, value in row["evaluation"].items() if value is not None}
    for name in ("kl", "cosine"):
        if name in found:
            found[name] = {"value": found[name], "low": None, "high": None}
    if "value" in found:
        found["dense"] = {name: dense["evaluation"][name] for name in ("value", "error", "bits_per_byte")}
    return found
