"""A recipe applied to a model's sizes, before any weight is touched."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .allocators import ALLOCATORS
from .errors import BudgetError
from .plan import Budget, Counts, prunable
from .recipe import Recipe
from .sites import Site, by_block, find_sites
from .stock import stock_config


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe applied to a model's sizes: who may lose units, how many stay, and what to tell the user first."""

    sites: list[Site]
    budget: Budget
    counts: Counts
    step: int
    prunable: int
    notes: list[str] = field(default_factory=list)


def plan_counts(model: PreTrainedModel, recipe: Recipe) -> Job:
    """How many units each site keeps under a recipe; touches no weight and reads no text.

    Raises:
        BudgetError: whole units cannot meet the budget.
        UnsupportedModelError: unknown family.
    """
    everything = find_sites(model, recipe.unit)
    blocks = recipe.block_range(len(by_block(everything)))
    notes = []
    chosen = [s for s in everything if s.name in recipe.sites and s.block in blocks]
    fixed = sorted({s.name for s in chosen if not s.spec.stock and not recipe.per_block})
    if fixed:
        chosen = [s for s in chosen if s.name not in fixed]
        notes.append(
            f"{model.config.model_type}: no stock config can say another number of heads, so {' and '.join(fixed)} "
            "stays and FFN channels pay the whole budget; --per-block prunes heads too (opens with prunelm.load)"
        )
    if not chosen:
        raise BudgetError(
            f"no site is left to prune: blocks {recipe.blocks!r}, sites {', '.join(recipe.sites)}. "
            "Choose other --blocks or --sites."
        )
    total = prunable(everything if recipe.unit == "group" else find_sites(model))
    whole = sum(p.numel() for p in model.parameters())
    multiple = recipe.multiple_of or (16 if whole < 1_000_000_000 else 128)
    asked_of = total if recipe.of == "blocks" else whole
    budget = Budget(
        target=math.floor(recipe.sparsity * asked_of),
        asked_of=asked_of,
        total=prunable(chosen),
        multiple_of=multiple,
        min_units=recipe.min_units,
        attention_share=recipe.attention_share,
        legal=(lambda _site, _kept: True) if recipe.per_block else _legal(model),
    )
    counts, step = ALLOCATORS[recipe.allocator](chosen, budget)
    if not recipe.per_block:
        _check_uniform(everything, counts)
    return Job(sites=chosen, budget=budget, counts=counts, step=step, prunable=total, notes=notes)


def _check_uniform(sites: list[Site], counts: Counts) -> None:
    """Raise if blocks would end with different widths, which no stock config can say."""
    for name in dict.fromkeys(site.name for site in sites):
        widths = {counts.get(site.key, site.n_units) for site in sites if site.name == name}
        if len(widths) > 1:
            raise BudgetError(
                f"blocks would keep from {min(widths)} to {max(widths)} units of {name}, and a stock config says one "
                "number for all. Say --per-block (opens with prunelm.load), or use --allocator uniform on all blocks."
            )


def _legal(model: PreTrainedModel) -> Callable[[Site, int], bool]:
    """Whether a stock config can say that every block keeps this many units of a site; asked of transformers once."""
    known: dict[tuple[str, int], bool] = {}

    def legal(site: Site, kept: int) -> bool:
        key = (site.name, kept if site.spec.probabilities is not None else 0)
        if key not in known:
            known[key] = stock_config(model.config, site.config_values(kept)) is not None
        return known[key]

    return legal
