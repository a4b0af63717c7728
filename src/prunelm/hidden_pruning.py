"""The hidden step of a run: channels of the residual stream go, everywhere, before any site loses units."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .data import Batches
from .hidden import find_hidden, narrow_hidden_
from .hidden_repair import narrow_and_repair_hidden_
from .hidden_scores import reader_energy, reader_magnitude
from .losses import without_labels
from .plan import top_units
from .progress import Progress
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .stream import BlockStream


@torch.no_grad()
def remove_hidden_(
    model: PreTrainedModel, calibration: Batches, recipe: Recipe, keep: int, progress: Progress
) -> dict[str, Any]:
    """Remove all but `keep` hidden channels in place, repair what read them, and say what was done.

    Raises:
        CalibrationError: statistics are not finite, or too few tokens; names the layer.
    """
    axis = find_hidden(model)
    reconstruction = RECONSTRUCTIONS[recipe.reconstruction]
    repairs = reconstruction.stage != "none"
    fit, held = calibration.split(recipe.held_out if repairs else 0.0)
    batches = [without_labels(batch) for batch in (*fit.batches, *held.batches)]
    first, second = range(len(fit.batches)), range(len(fit.batches), len(batches))
    if recipe.hidden_criterion == "energy":
        scores = reader_energy(BlockStream(model, batches), axis, first, progress)
    else:
        scores = reader_magnitude(axis)
    kept = top_units(scores, keep)
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
