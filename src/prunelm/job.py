"""A recipe applied to a model's sizes, before any weight is touched."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from transformers import PreTrainedModel

from .allocators import ALLOCATORS, Measured
from .biases import add_biases_, missing_biases, remove_biases_
from .errors import BudgetError
from .knapsack import least_step
from .plan import Budget, Counts, prunable
from .probable import check_block_budget
from .recipe import Recipe
from .sites import Site, by_block, find_sites
from .stock import stock_config


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe applied to a model's sizes: who may lose units, how many stay, and what to tell the user first.

    `counts` is None while the allocator waits for measurements of the model; `added` are biases that the model got.
    """

    everything: list[Site]
    sites: list[Site]
    budget: Budget
    counts: Counts | None
    step: int
    prunable: int
    added: int = 0
    notes: list[str] = field(default_factory=list)

    def keeps(self, site: Site) -> int:
        """How many units of a site stay; all of them where it may lose none."""
        assert self.counts is not None
        return self.counts.get(site.key, site.n_units)


def plan_counts(model: PreTrainedModel, recipe: Recipe, floor: Mapping[str, int] | None = None) -> Job:
    """How many units each site keeps under a recipe; touches no weight and reads no text.

    Where the allocator needs measurements, only whether the budget can be met at all is known, and `counts` is None.

    Raises:
        BudgetError: whole units cannot meet the budget.
        UnsupportedModelError: unknown family.
    """
    everything = find_sites(model, recipe.unit)
    blocks = recipe.block_range(len(by_block(everything)))
    notes = []
    chosen = [s for s in everything if s.name in recipe.sites and s.block in blocks]
    free = recipe.per_block or recipe.drops_blocks
    fixed = sorted({s.name for s in chosen if not s.spec.stock and not free})
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
        floor=floor or {},
        legal=_runs(model) if free else _legal(model),
    )
    job = Job(everything=everything, sites=chosen, budget=budget, counts=None, step=0, prunable=total, notes=notes)
    if ALLOCATORS[recipe.allocator].needs is None and not recipe.searches_widths:
        return decide(job, recipe)
    if recipe.drops_blocks:
        check_block_budget(model, chosen, budget)
    else:
        least_step(chosen, budget)
    return job


def prepare_(model: PreTrainedModel, recipe: Recipe, floor: Mapping[str, int] | None = None) -> Job:
    """The plan of a recipe, after giving consumers a bias where the recipe asks for one and the config has room.

    Raises:
        BudgetError: whole units cannot meet the budget; the model is as it was.
    """
    if not recipe.bias:
        return plan_counts(model, recipe, floor)
    sites, without = missing_biases(model, recipe.sites)
    added = add_biases_(model, sites)
    try:
        job = plan_counts(model, recipe, floor)
    except BudgetError:
        remove_biases_(model, sites)
        raise
    if added:
        flags = dict.fromkeys(site.spec.bias[0] for site in sites if site.spec.bias)
        job.notes.append(f"{added:,} bias parameters were added ({', '.join(flags)}), for repairs to use")
    if without:
        kinds = " and ".join(without)
        job.notes.append(f"{model.config.model_type}: its config gives {kinds} no bias, so repairs there have none")
    return replace(job, added=added)


def decide(job: Job, recipe: Recipe, *measured: Measured) -> Job:
    """The job with its counts, by the recipe's allocator and what that needs.

    Raises:
        BudgetError: whole units cannot meet the budget, or blocks would differ where a stock config says one number.
    """
    counts, step = ALLOCATORS[recipe.allocator](job.sites, job.budget, *measured)
    if not recipe.per_block:
        _check_uniform(job.everything, counts)
    return replace(job, counts=counts, step=step)


def _check_uniform(sites: list[Site], counts: Counts) -> None:
    """Raise if blocks would end with different widths, which no stock config can say."""
    for name in dict.fromkeys(site.name for site in sites):
        widths = {counts.get(site.key, site.n_units) for site in sites if site.name == name}
        if len(widths) > 1:
            raise BudgetError(
                f"blocks would keep from {min(widths)} to {max(widths)} units of {name}, and a stock config says one "
                "number for all. Say --per-block (opens with prunelm.load), or use --allocator uniform on all blocks."
            )


def _runs(model: PreTrainedModel) -> Callable[[Site, int], bool]:
    """Whether a model whose blocks may differ still generates with this many kept units of a site.

    Its cache is asked how long it is at the first attention of each type, which must therefore stay.
    """
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    anchors = {kinds.index(kind) for kind in set(kinds)} if model.can_generate() else set()
    return lambda site, kept: kept > 0 or site.spec.probabilities is None or site.block not in anchors


def _legal(model: PreTrainedModel) -> Callable[[Site, int], bool]:
    """Whether a stock config can say that every block keeps this many units of a site; asked of transformers once."""
    known: dict[tuple[str, int], bool] = {}

    def legal(site: Site, kept: int) -> bool:
        key = (site.name, kept if site.spec.probabilities is not None else 0)
        if key not in known:
            known[key] = stock_config(model.config, site.config_values(kept)) is not None
        return known[key]

    return legal
