"""What is known of some pruned models: the files in their folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..curves import FILE as CURVES
from ..errors import CheckpointError
from ..loading import PLAN_FILE, read_json
from ..suite.measuring import FILE as EVALUATION
from ..suite.measuring import read_evaluation

TRANSFER = "transfer.json"


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """One pruned model: its name, its pruning.json, and the other files that were found beside it."""

    name: str
    folder: Path
    pruning: dict[str, Any]
    curves: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    transfer: dict[str, Any] | None

    def part(self, name: str) -> dict[str, Any] | None:
        """The results of a part of the evaluation, or None where it was not measured."""
        found = (self.evaluation or {"parts": {}})["parts"].get(name)
        return None if found is None else dict(found["results"])


def gather(folder: Path) -> list[Gathered]:
    """The pruned model in a folder, or those in the folders below it, the largest first.

    Raises:
        CheckpointError: neither the folder nor any below it has a pruning.json.
    """
    folders = [folder] if (folder / PLAN_FILE).is_file() else [p.parent for p in folder.glob(f"*/{PLAN_FILE}")]
    if not folders:
        raise CheckpointError(
            f"{folder}: no pruning.json in it or one level below. Name a folder that prunelm prune wrote."
        )
    found = [
        _one(path, path.resolve().name if path == folder else f"{folder.resolve().name}/{path.name}")
        for path in folders
    ]
    return sorted(found, key=lambda one: (-one.pruning["parameters"]["after"], one.name))


def _one(folder: Path, name: str) -> Gathered:
    def optional(name: str) -> dict[str, Any] | None:
        return read_json(folder / name) if (folder / name).is_file() else None

    return Gathered(
        name=name,
        folder=folder,
        pruning=read_json(folder / PLAN_FILE),
        curves=optional(CURVES),
        evaluation=read_evaluation(folder / EVALUATION) if (folder / EVALUATION).is_file() else None,
        transfer=optional(TRANSFER),
    )
