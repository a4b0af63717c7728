"""What is known of some pruned models: the files in their folders, as far as they are of these models."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..curves import FILE as CURVES
from ..errors import CheckpointError
from ..loading import PLAN_FILE, Source, read_json
from ..suite.measuring import FILE as EVALUATION
from ..suite.measuring import read_evaluation, weights_digest
from ..tasks import task_named

TRANSFER = "transfer.json"
CLOSE = 1e-5
"""How far sparsities may differ that are called the same, for commands write them in six digits."""


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """One pruned model: its name, its pruning.json, and the other files that were found beside it.

    `task` as `task_of` names it; `left_out` says which files are of another model.
    """

    name: str
    pruning: dict[str, Any]
    curves: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    transfer: dict[str, Any] | None
    task: str = "causal"
    left_out: tuple[str, ...] = ()

    def part(self, name: str) -> dict[str, Any] | None:
        """The results of a part of the evaluation, or None where it was not measured."""
        found = (self.evaluation or {"parts": {}})["parts"].get(name)
        return None if found is None else dict(found["results"])


def model_folders(folder: Path) -> list[Path]:
    """The folder, if it holds a pruned model, or those below it.

    Raises:
        CheckpointError: neither the folder nor any below it has a pruning.json.
    """
    folders = [folder] if (folder / PLAN_FILE).is_file() else [p.parent for p in folder.glob(f"*/{PLAN_FILE}")]
    if not folders:
        raise CheckpointError(
            f"{folder}: no pruning.json in it or one level below. Name a folder that prunelm prune wrote."
        )
    return folders


def gather(folder: Path) -> list[Gathered]:
    """The pruned model in a folder, or those in the folders below it, the largest first.

    Raises:
        CheckpointError: neither the folder nor any below it has a pruning.json.
    """
    found = [
        _one(path, path.resolve().name if path == folder else f"{folder.resolve().name}/{path.name}")
        for path in model_folders(folder)
    ]
    return sorted(found, key=lambda one: (-one.pruning["parameters"]["after"], one.name))


def _one(folder: Path, name: str) -> Gathered:
    pruning = read_json(folder / PLAN_FILE)
    found: dict[str, dict[str, Any] | None] = {}
    left_out = []
    for file, (read, why) in _BESIDE.items():
        data = read(folder / file) if (folder / file).is_file() else None
        said = why(data, pruning, folder) if data is not None else None
        if said is not None:
            left_out.append(f"{name}: {file} was left out, since it is of another model: {said}.")
        found[file] = None if said is not None else data
    return Gathered(
        name=name,
        pruning=pruning,
        curves=found[CURVES],
        evaluation=found[EVALUATION],
        transfer=found[TRANSFER],
        task=_task(folder, found[EVALUATION]),
        left_out=tuple(left_out),
    )


def _other_weights(evaluation: Mapping[str, Any], pruning: Mapping[str, Any], folder: Path) -> str | None:
    """Why an evaluation is not of the model in a folder; by its size where the weights are not there."""
    measured = evaluation["model"]
    if any(folder.glob("*.safetensors")):
        here = weights_digest(Source(name=str(folder), folder=folder))
        if measured["weights"] == here:
            return None
        return f"it was measured on {measured['name']} with weights {measured['weights']}, and here are {here}"
    sizes = measured.get("parameters"), pruning["parameters"]["after"]
    if sizes[0] in (None, sizes[1]):
        return None
    return f"it was measured on {measured['name']} of {sizes[0]:,} parameters, and this one has {sizes[1]:,}"


def _other_plan(curves: Mapping[str, Any], pruning: Mapping[str, Any], _folder: Path) -> str | None:
    """Why curves do not lead to the widths of a plan."""
    for key, site in curves["sites"].items():
        mine = pruning["sites"].get(key, {"units": 0, "kept": []})
        both = (site["kept"], site["units"]), (len(mine["kept"]), mine["units"])
        if both[0] != both[1]:
            there, here = (f"{kept:,} of {units:,}" for kept, units in both)
            return f"it keeps {there} units of {key}, and this one {here}"
    return None


def _other_recipe(transfer: Mapping[str, Any], pruning: Mapping[str, Any], _folder: Path) -> str | None:
    """Why a matrix of texts is not of this dense model, recipe and size."""
    there, here = (
        (Path(name).name, recipe["name"], recipe["sparsity"])
        for name, recipe in (
            (transfer["model"]["name"], transfer["recipe"]),
            (pruning["base_model"], pruning["recipe"]),
        )
    )
    if there[:2] == here[:2] and math.isclose(there[2], here[2], abs_tol=CLOSE):
        return None
    said = [f"{model} pruned with {recipe} at {sparsity:g}" for model, recipe, sparsity in (there, here)]
    return f"it says {said[0]}, and this one is {said[1]}"


Why = Callable[[Mapping[str, Any], Mapping[str, Any], Path], str | None]
_BESIDE: dict[str, tuple[Callable[[Path], dict[str, Any]], Why]] = {
    EVALUATION: (read_evaluation, _other_weights),
    CURVES: (read_json, _other_plan),
    TRANSFER: (read_json, _other_recipe),
}
"""The files beside a pruning.json: what reads each, and what says why it is of another model."""


def _task(folder: Path, evaluation: Mapping[str, Any] | None) -> str:
    """What the model is for: by its config, else by how it was measured, else as most models are."""
    config = folder / "config.json"
    names = read_json(config).get("architectures") if config.is_file() else None
    if names:
        return task_named(str(names[0]))
    metric = (evaluation or {"parts": {}})["parts"].get("quality", {}).get("results", {}).get("metric")
    return _MEASURED.get(metric, "causal")


_MEASURED = {"masked perplexity": "masked", "accuracy": "classifier", "embedding": "embedding"}
