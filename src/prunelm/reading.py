"""What is read for what: which batches to fit, to hold out and to refit on, and which statistics of each site."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from .allocators import ALLOCATORS
from .criteria import CRITERIA
from .data import Batches
from .errors import DataError, RecipeError
from .gradients import Gradient, collect
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .sites import Site
from .stream import Batch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Batches with the places of those to fit, held out and for refits, and the statistics needed per kind of site."""

    batches: list[Batch]
    fit: range
    held: range
    refit: range
    needs: dict[str, frozenset[str]]
    sequences: int

    @property
    def places(self) -> dict[str, range]:
        """The batches that each statistic is measured on."""
        return {"consumer": self.fit, "held": self.held, "producer": self.refit}

    def gradients(self, model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, Gradient] | None:
        """Gradients of the dense model on the batches to fit, if a criterion reads them.

        Raises:
            CalibrationError: a gradient is not finite; names the layer.
            UnsupportedModelError: the model has no such loss.
        """
        wanted = [site for site in sites if "gradients" in self.needs[site.name]]
        return collect(model, [self.batches[b] for b in self.fit], wanted) if wanted else None

    def priced(self, recipe: Recipe) -> list[int]:
        """Held-out batches that prices are measured on: whole ones up to the recipe's tokens, at least one.

        Raises:
            DataError: nothing was held out.
        """
        if not self.held:
            raise DataError(
                f"{self.sequences} calibration sequences leave none to hold out: allocator {recipe.allocator!r} "
                f"needs at least {round(1 / recipe.held_out)}. Give more text, --samples or --held-out."
            )
        chosen: list[int] = []
        tokens = 0
        for b in self.held:
            if chosen and tokens >= recipe.price_tokens:
                break
            chosen.append(b)
            tokens += self.batches[b]["input_ids"].numel()
        return chosen


def reading(calibration: Batches, refit: Batches | None, recipe: Recipe, sites: Sequence[Site]) -> Reading:
    """What a recipe reads of some batches.

    Args:
        calibration: what criteria and repairs read, with what is held out.
        refit: what covariances are taken from; the calibration by default.
        recipe: says what is needed.
        sites: that may lose units.

    Raises:
        RecipeError: a criterion that compares heads is asked to score a site without.
    """
    stage = RECONSTRUCTIONS[recipe.reconstruction].stage
    priced = ALLOCATORS[recipe.allocator].needs == "damage"
    fit, held = calibration.split(recipe.held_out if stage == "repair" or priced else 0.0)
    batches = [*fit.batches, *held.batches]
    first, second = range(len(fit.batches)), range(len(fit.batches), len(batches))
    third = first
    if refit is not None:
        third = range(len(batches), len(batches) + len(refit.batches))
        batches += refit.batches
    needs = {}
    for site in {site.name: site for site in sites}.values():
        needs[site.name] = _needs(site, recipe)
        if stage == "repair" or priced:
            needs[site.name] |= {"gram"}
        if stage == "repair" and second:
            needs[site.name] |= {"held"}
    return Reading(
        batches=batches if any(needs.values()) or stage == "refit" else [],
        fit=first,
        held=second,
        refit=third,
        needs=needs,
        sequences=sum(len(batch["input_ids"]) for batch in calibration.batches),
    )


def _needs(site: Site, recipe: Recipe) -> frozenset[str]:
    scoring = recipe.scoring(site.name)
    needs = CRITERIA[scoring.criterion].needs(**scoring.options)
    if "similarity" in needs and site.spec.probabilities is None:
        raise RecipeError(f"criterion {scoring.criterion!r} compares heads, and {site.name} has none")
    return needs
