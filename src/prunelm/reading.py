"""What is read for what: which batches to fit, to hold out and to refit on, and which statistics of each site."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .criteria import CRITERIA
from .data import Batches
from .distributed import in_turns, rank, size
from .errors import DataError, RecipeError
from .losses import without_labels
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .sites import Site
from .stream import Batch


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Batches with the places of those to fit, held out and for refits, and the statistics needed per kind of site.

    `batches` and places are those dealt to this process; `whole` are all batches, in the same order of kinds, with
    `judged` the places of those that prices are measured on and `here` the places that they have in `batches`.
    `fitted` and `judging` are the batches to fit and those held out, with labels where there are any. The last
    `repeated_tokens` of `judged` are sequences whose second half is their first half again. `scored` is what criteria
    and curvatures read; `needs` what repairs and rehearsals read too.
    """

    batches: list[Batch]
    fit: range
    held: range
    refit: range
    whole: list[Batch]
    judged: list[int]
    here: dict[int, int]
    repeated_tokens: int
    scored: dict[str, frozenset[str]]
    needs: dict[str, frozenset[str]]
    sequences: int
    fitted: Batches
    judging: Batches

    @property
    def places(self) -> dict[str, range]:
        """The batches that each statistic is measured on."""
        return {"consumer": self.fit, "held": self.held, "producer": self.refit}

    def fit_parts(self, count: int) -> list[list[int]]:
        """This process's batches to fit, in so many parts of all of them, which any number of processes share alike.

        Fewer parts where there are fewer batches.
        """
        whole = len(self.fitted.batches)
        count = min(count, whole)
        parts: list[list[int]] = [[] for _ in range(count)]
        for b, place in zip(self.fit, in_turns(range(whole)), strict=True):
            parts[place * count // whole].append(b)
        return parts

    def first_held(self, share: float) -> list[int]:
        """This process's of the first held-out batches, at least one, that have a share of all held-out tokens."""
        first = len(self.fitted.batches)
        places = range(first, first + len(self.judging.batches))
        tokens = sum(self.whole[b]["input_ids"].numel() for b in places)
        return [self.here[b] for b in _up_to(self.whole, places, round(share * tokens)) if b in self.here]

    def check_held(self, what: str) -> None:
        """Raise unless something was held out, for what is said of it.

        Raises:
            DataError: with the number of sequences.
        """
        if not self.judging.batches:
            raise DataError(
                f"{self.sequences} calibration sequence leaves none to hold out, which {what}: at least 2 are needed. "
                "Give more text or --samples, or a smaller --length."
            )

    def fisher_batches(self, recipe: Recipe) -> list[Batch]:
        """The batches that Fisher matrices are taken from: whole ones up to the recipe's tokens."""
        places = range(min(len(self.fitted.batches), len(self.whole)))
        return [self.whole[b] for b in _up_to(self.whole, places, recipe.fisher_tokens)]

    def priced(self, recipe: Recipe) -> list[int]:
        """This process's batches that prices are measured on: held-out ones up to the recipe's tokens, repeating ones.

        Raises:
            DataError: nothing was held out.
        """
        self.check_held(f"allocator {recipe.allocator!r} measures on")
        return [self.here[b] for b in self.judged if b in self.here]

    @property
    def judged_batches(self) -> list[Batch]:
        """All batches that prices are measured on, those of other processes too."""
        return [self.whole[b] for b in self.judged]


def _up_to(batches: Sequence[Batch], places: Sequence[int], tokens: int) -> list[int]:
    """The first of some batches that have that many tokens together, at least one."""
    chosen: list[int] = []
    seen = 0
    for b in places:
        if chosen and seen >= tokens:
            break
        chosen.append(b)
        seen += batches[b]["input_ids"].numel()
    return chosen


def _repeating(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """So many tokens of sequences that say their first half twice, made from whole sequences without padding."""
    found: list[Batch] = []
    seen = 0
    for batch in batches:
        half = batch["input_ids"].shape[1] // 2
        if seen >= tokens:
            break
        if half and bool(batch.get("attention_mask", torch.ones(())).all()):
            inputs = without_labels(batch)
            found.append({name: torch.cat([value[:, :half]] * 2, dim=1) for name, value in inputs.items()})
            seen += found[-1]["input_ids"].numel()
    return found


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
    judges = stage == "repair" or recipe.judges_output
    fit, held = calibration.split(recipe.held_out if judges else 0.0)
    fit = fit.at_least(recipe.natural_steps)
    batches = [without_labels(batch) for batch in (*fit.batches, *held.batches)]
    first, second = range(len(fit.batches)), range(len(fit.batches), len(batches))
    third = first
    if refit is not None:
        third = range(len(batches), len(batches) + len(refit.batches))
        batches += refit.batches
    repeating = _repeating(held.batches, round(recipe.repeated * recipe.price_tokens)) if recipe.prices_output else []
    batches += repeating
    scored, needs = dict[str, frozenset[str]](), dict[str, frozenset[str]]()
    for site in {site.name: site for site in sites}.values():
        scored[site.name] = _needs(site, recipe) | ({"gram", "fisher"} if recipe.reads_fisher else set())
        needs[site.name] = scored[site.name]
        if stage == "repair" or recipe.prices_output:
            needs[site.name] |= {"gram"}
        if stage == "repair" and second:
            needs[site.name] |= {"held"}
    last = range(len(batches) - len(repeating), len(batches))
    fresh = recipe.price_tokens * (1 - recipe.repeated) if repeating else recipe.price_tokens
    judged = [*(_up_to(batches, second, round(fresh)) if fresh else []), *last]
    dealt = _dealt(batches, [first, second, *([third] if refit is not None else []), last])
    here = {b: n for n, b in enumerate(dealt)}
    fit_here = _span(first, here)
    whole = batches if any(needs.values()) or stage == "refit" or recipe.natural_steps else []
    return Reading(
        batches=[batches[b] for b in dealt] if whole else [],
        fit=fit_here,
        held=_span(second, here),
        refit=fit_here if refit is None else _span(third, here),
        whole=whole,
        judged=judged,
        here=here,
        repeated_tokens=sum(batch["input_ids"].numel() for batch in repeating),
        scored=scored,
        needs=needs,
        sequences=sum(len(batch["input_ids"]) for batch in calibration.batches),
        fitted=fit,
        judging=held,
    )


def _dealt(batches: Sequence[Batch], kinds: Sequence[range]) -> list[int]:
    """The places of this process's batches: the first kind in turns, the others to whoever has the fewest tokens."""
    tokens = [sum(batches[b]["input_ids"].numel() for b in kinds[0][r :: size()]) for r in range(size())]
    mine = list(in_turns(kinds[0]))
    for b in itertools.chain(*kinds[1:]):
        least = tokens.index(min(tokens))
        tokens[least] += batches[b]["input_ids"].numel()
        mine += [b] * (least == rank())
    return mine


def _span(kind: range, here: Mapping[int, int]) -> range:
    """The places that the batches of one kind have on this process, where they lie one behind the other."""
    found = [here[b] for b in kind if b in here]
    return range(found[0], found[-1] + 1) if found else range(0)


def _needs(site: Site, recipe: Recipe) -> frozenset[str]:
    scoring = recipe.scoring(site.name)
    needs = CRITERIA[scoring.criterion].needs(**scoring.options)
    if "similarity" in needs and site.spec.probabilities is None:
        raise RecipeError(f"criterion {scoring.criterion!r} compares heads, and {site.name} has none")
    return needs
