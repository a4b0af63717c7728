"""The hidden step of a run: channels of the residual stream go, everywhere, before any site loses units."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .data import Batches
from .distributed import agreed
from .hidden import find_hidden, narrow_hidden_
from .hidden_repair import narrow_and_repair_hidden_
from .hidden_scores import reader_energy, reader_magnitude
from .losses import without_labels
from .plan import top_units
from .progress import Progress
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .stream import BlockStream
from .workbench import Step, Workbench


@torch.no_grad()
def remove_hidden_(
    model: PreTrainedModel, calibration: Batches, recipe: Recipe, keep: int, bench: Workbench, progress: Progress
) -> dict[str, Any]:
    """Remove all but `keep` hidden channels in place, repair what read them, and say what was done.

    All weights are kept on the bench, and taken from there where an earlier run came so far.

    Raises:
        CalibrationError: statistics are not finite, or too few tokens; names the layer.
    """
    step = bench.get("hidden")
    weights = [bench.get(f"hidden-{n}") for n in range(step.facts["weights"])] if step is not None else [None]
    if step is not None and None not in weights:
        narrow_hidden_(model, torch.tensor(step.facts["found"]["kept"]))
        for parameter, kept in zip(model.parameters(), weights, strict=True):
            assert kept is not None
            parameter.copy_(kept.tensors["value"])
        return dict(step.facts["found"])
    found = _removed(model, calibration, recipe, keep, progress)
    for n, parameter in enumerate(model.parameters()):
        bench.put(f"hidden-{n}", Step(tensors={"value": parameter}))
    bench.put("hidden", Step(facts={"found": found, "weights": len(list(model.parameters()))}))
    return found


def _removed(
    model: PreTrainedModel, calibration: Batches, recipe: Recipe, keep: int, progress: Progress
) -> dict[str, Any]:
    axis = find_hidden(model)
    reconstruction = RECONSTRUCTIONS[recipe.reconstruction]
    repairs = reconstruction.stage != "none"
    fit, held = calibration.split(recipe.held_out if repairs or recipe.judges_output else 0.0)
    batches = [without_labels(batch) for batch in (*fit.batches, *held.batches)]
    first, second = range(len(fit.batches)), range(len(fit.batches), len(batches))
    if recipe.hidden_criterion == "energy":
        scores = reader_energy(BlockStream(model, batches), axis, first, progress)
    else:
        scores = reader_magnitude(axis)
    kept = top_units(agreed(scores.contiguous()), keep)
    found: dict[str, Any] = {"units": axis.width, "kept": kept.tolist(), "criterion": recipe.hidden_criterion}
    if not repairs:
        narrow_hidden_(model, kept)
        return found
    found["judged_on"] = "held-out tokens" if second else "fitted tokens"
    found["readers"] = narrow_and_repair_hidden_(
        model,
        kept,
        batches,
        first,
        second,
        reconstruction=reconstruction,
        ridge=recipe.ridge,
        progress=progress,
    )
    return found
