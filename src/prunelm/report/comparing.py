"""The page of a comparison: what was just measured, where a folder has no evaluation of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import write_page
from .gathering import gather

Row = Mapping[str, Any]


def write_comparison(
    rows: Sequence[Row], folders: Sequence[str], text: Path | None, windows: Mapping[str, Any], out: Path
) -> Path:
    """The page of some pruned models, measured by `prunelm compare`; files that they have say more and come first.

    Args:
        rows: of `prunelm.compare`, the dense model first.
        folders: the pruned models, in the order of the other rows.
        text: that they were compared on.
        windows: settings that the quality hangs on.
        out: file to write.

    Raises:
        CheckpointError: a folder has no pruning.json.
        OutputError: the page cannot be written.
    """
    found = []
    for folder, row in zip(folders, rows[1:], strict=True):
        for one in gather(Path(folder)):
            found.append(
                one if one.evaluation is not None else replace(one, evaluation=_evaluation(rows[0], row, text, windows))
            )
    return write_page(found, out)


def _evaluation(dense: Row, row: Row, text: Path | None, windows: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison's row in the form of `evaluation.json`."""
    parts: dict[str, Any] = {}
    if "evaluation" in row and text is not None:
        name = {"name": text.name}
        met = row["evaluation"]["facts"].get("overlap")
        parts["quality"] = {"settings": dict(windows), "text": name, "overlap": met, "results": _quality(dense, row)}
    if "speedup" in row:
        ratio = dict.fromkeys(("value", "low", "high"), row["speedup"])
        speeds = {who: {"prefill": one["tokens_per_second"]} for who, one in (("dense", dense), ("model", row))}
        parts["speed"] = {"settings": {}, "results": {**speeds, "ratio": {"prefill": ratio}}}
    return {"against": {"name": dense["model"]}, "parts": parts}


def _quality(dense: Row, row: Row) -> dict[str, Any]:
    found = {name: value for name, value in row["evaluation"].items() if value is not None}
    for name in ("kl", "cosine"):
        if name in found:
            found[name] = {"value": found[name], "low": None, "high": None}
    if "value" in found:
        found["dense"] = {name: dense["evaluation"][name] for name in ("value", "error", "bits_per_byte")}
    return found
