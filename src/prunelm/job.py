"""A recipe applied to a model's sizes, before any weight is touched."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from .allocators import ALLOCATORS, Measured
from .biases import add_biases_, missing_biases, remove_biases_
from .errors import BudgetError, RecipeError
from .hidden import narrow_hidden_
from .knapsack import least_step
from .knee import beyond_knee
from .plan import Budget, Counts, Nested, parameters_of, prunable
from .probable import check_block_budget
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .sites import Site, architecture_of, by_block, find_sites
from .stock import stock_config, why_relabeled
from .targets import (
    accepted_widths,
    check_held,
    check_targets,
    default_multiple,
    readers_of,
    spoken,
    unbiased_sites,
    unread_sites,
)

NarrowHidden = Callable[[PreTrainedModel, int], None]
"""Removes all but so many hidden channels of a model in place."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Sizes of a model before hidden channels went: the parameters of its units, and all of them."""

    prunable: int
    parameters: int


def dense_sizes(model: PreTrainedModel) -> Dense:
    """The sizes of a model as it is."""
    return Dense(prunable=prunable(find_sites(model)), parameters=sum(p.numel() for p in model.parameters()))


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe applied to a model's sizes: who may lose units, how many stay, and what to tell the user first.

    `counts` is None while the allocator waits for measurements of the model; `added` are biases that the model got.
    `narrowed` and `outside` are parameters that went with hidden channels: those of units, and all others.
    """

    everything: list[Site]
    sites: list[Site]
    budget: Budget
    counts: Counts | None
    step: int
    prunable: int
    added: int = 0
    narrowed: int = 0
    outside: int = 0
    notes: list[str] = field(default_factory=list)

    def keeps(self, site: Site) -> int:
        """How many units of a site stay; all of them where it may lose none."""
        assert self.counts is not None
        return self.counts.get(site.key, site.n_units)


def plan_counts(
    model: PreTrainedModel,
    recipe: Recipe,
    nested: Nested | None = None,
    dense: Dense | None = None,
    counts: Counts | None = None,
) -> Job:
    """How many units each site keeps under a recipe; touches no weight and reads no text.

    Where the allocator needs measurements, only whether the budget can be met at all is known, and `counts` is None.
    Where hidden channels have gone before, `dense` are the sizes from before, and what went with them is paid. With
    `counts`, decided beforehand, these are the plan, and what they remove is the budget.

    Raises:
        BudgetError: whole units cannot meet the budget, or hidden channels alone exceed it.
        RecipeError: the recipe removes hidden channels, and they are all there.
        UnsupportedModelError: unknown family.
    """
    if recipe.hidden and dense is None:
        raise RecipeError(
            f"hidden {recipe.hidden:g} goes with one size and one look at the model: leave it out for saved "
            "calibrations and for several sizes at once"
        )
    everything = find_sites(model, recipe.unit)
    check_targets(model.config, recipe.targets, uneven=recipe.per_block)
    chosen, notes = _in_reach(model, everything, recipe)
    now = dense_sizes(model)
    dense = dense or now
    narrowed = dense.prunable - now.prunable
    budget = _budget(model, chosen, recipe, nested or Nested(), dense, now)
    notes += beyond_knee(recipe.name, (budget.target + narrowed) / dense.prunable)
    job = Job(
        everything=everything,
        sites=chosen,
        budget=budget,
        counts=None,
        step=0,
        prunable=dense.prunable,
        narrowed=narrowed,
        outside=dense.parameters - now.parameters - narrowed,
        notes=notes,
    )
    return with_counts(job, counts) if counts is not None else _counted(job, recipe)


def _budget(
    model: PreTrainedModel, sites: list[Site], recipe: Recipe, nested: Nested, dense: Dense, now: Dense
) -> Budget:
    """What may go, less what has gone with hidden channels: with their units, or in all, whichever is counted."""
    of_blocks = recipe.of == "blocks"
    asked_of = dense.prunable if of_blocks else dense.parameters
    gone = dense.prunable - now.prunable if of_blocks else dense.parameters - now.parameters
    return Budget(
        target=parameters_of(recipe.sparsity, asked_of) - gone,
        asked_of=asked_of,
        total=prunable(sites),
        multiple_of=_multiple_of(recipe, dense.parameters),
        min_units=recipe.min_units,
        attention_share=recipe.attention_share,
        floor=nested.floor,
        ceiling=nested.ceiling,
        legal=accepted_widths(model, recipe.targets, recipe.tensor_parallel, uneven=_free(recipe)),
    )


def _counted(job: Job, recipe: Recipe) -> Job:
    """The job with its counts, or without them where the allocator needs measurements and the budget can be met."""
    _check_divided(job, recipe)
    try:
        if recipe.hidden:
            _check_hidden_paid(job, recipe)
        if not recipe.decides_by_looking:
            return decide(job, recipe)
        if recipe.drops_blocks:
            check_block_budget(job.sites, job.budget, len(by_block(job.everything)))
        else:
            least_step(job.sites, job.budget)
    except BudgetError as error:
        if recipe.hidden and 0 <= job.budget.target < _largest_step(job, recipe):
            return _nothing_more(job, recipe)
        raise BudgetError(f"{error}{_other_sites(job, recipe)}") from None
    return job


def _other_sites(job: Job, recipe: Recipe) -> str:
    """Which kinds of site the recipe leaves alone, for a budget that the others cannot pay."""
    most = sum(job.budget.options(site)[-1] * site.cost for site in job.sites)
    spared = sorted({site.name for site in job.everything} - set(recipe.sites))
    if not spared or job.budget.target <= most:
        return ""
    every = ",".join(dict.fromkeys(site.name for site in job.everything))
    return f" Recipe {recipe.name!r} leaves {' and '.join(spared)} alone; --sites {every} lets it lose units too."


def _free(recipe: Recipe) -> bool:
    """Whether no stock config has to say the widths that stay."""
    return recipe.per_block or recipe.drops_blocks


def with_counts(job: Job, counts: Counts) -> Job:
    """The job with counts that were decided beforehand, and what they remove as its budget."""
    counts = {site.key: counts.get(site.key, site.n_units) for site in job.sites}
    removed = sum((site.n_units - counts[site.key]) * site.cost for site in job.sites)
    return replace(job, counts=counts, budget=replace(job.budget, target=removed), step=1)


def _in_reach(model: PreTrainedModel, everything: list[Site], recipe: Recipe) -> tuple[list[Site], list[str]]:
    """The sites that may lose units where the result must open, and what to tell of the others.

    Raises:
        BudgetError: there are none.
    """
    kind, notes = model.config.model_type, []
    blocks = recipe.block_range(len(by_block(everything)))
    sites = [s for s in everything if s.name in recipe.sites and s.block in blocks]
    fixed = {s.name for s in sites if not s.spec.stock and not _free(recipe)}
    if fixed:
        notes.append(
            f"{kind}: no stock config can say another number of heads, so {' and '.join(sorted(fixed))} "
            "stays and FFN channels pay the whole budget; --per-block prunes heads too (opens with "
            "trust_remote_code or prunelm.load)"
        )
    for name, reader in unread_sites(model.config, readers_of(recipe.targets)).items():
        if name not in fixed and not recipe.drops_blocks and name in recipe.sites:
            fixed.add(name)
            notes.append(f"{kind}: {reader} takes the widths of {name} from the hidden size, so they stay")
    chosen = [s for s in sites if s.name not in fixed]
    if not chosen:
        raise BudgetError(
            f"no site is left to prune: blocks {recipe.blocks!r}, sites {', '.join(recipe.sites)}. "
            "Choose other --blocks or --sites."
        )
    return chosen, notes


def _check_divided(job: Job, recipe: Recipe) -> None:
    """Raise if the widths that stay cannot be divided over the devices, or the budget is too small to make them so.

    Raises:
        BudgetError: names the blocks, or says how much must go.
    """
    if recipe.tensor_parallel == 1:
        return
    budget = job.budget
    least = {site.key: budget.options(site)[0] for site in job.sites}
    who = spoken(recipe.targets, recipe.tensor_parallel)
    check_held(job.everything, lambda site: site.n_units - least.get(site.key, 0), budget.legal, who)
    needed = sum(least[site.key] * site.cost for site in job.sites)
    if needed > budget.target:
        raise BudgetError(
            f"{who}: {needed:,} parameters must go before heads and channels divide evenly, and the budget allows "
            f"{budget.target:,}. Ask for at least {budget.share(needed)}."
        )


def _multiple_of(recipe: Recipe, parameters: int) -> int:
    """What kept widths are a multiple of."""
    multiple = recipe.multiple_of or default_multiple(recipe.targets, parameters)
    return multiple * recipe.tensor_parallel


def hidden_width(width: int, recipe: Recipe, parameters: int) -> int:
    """How many of `width` hidden channels stay: at least 1 - hidden of them, and a multiple as FFN channels are.

    Raises:
        BudgetError: none would go; says the smallest share that takes some.
    """
    multiple = _multiple_of(recipe, parameters)
    kept = math.ceil(round((1 - recipe.hidden) * width, 6))
    kept += -kept % multiple
    if kept >= width:
        most = (width - 1) // multiple * multiple
        least = f"ask for at least {math.ceil((width - most) / width * 1e4) / 1e4:g}" if most else "leave it out"
        raise BudgetError(
            f"hidden {recipe.hidden:g} of {width} channels takes none: {kept} stay, a multiple of {multiple}. "
            f"With --multiple-of {multiple}, {least}."
        )
    return kept


def _check_hidden_paid(job: Job, recipe: Recipe) -> None:
    """Raise if the hidden channels alone cost more than the budget."""
    if job.budget.target < 0:
        asked = parameters_of(recipe.sparsity, job.budget.asked_of)
        gone = asked - job.budget.target
        raise BudgetError(
            f"hidden {recipe.hidden:g} alone removes {gone:,} parameters, and sparsity {recipe.sparsity:g} allows "
            f"{asked:,}: ask for sparsity {job.budget.share(gone)} or more, or for fewer hidden channels."
        )


def _largest_step(job: Job, recipe: Recipe) -> int:
    """Parameters between two plans that can be told apart: in one site, or in all blocks that share a width."""
    steps: dict[str, list[int]] = {}
    for site in job.sites:
        steps.setdefault(site.name, []).append(job.budget.step(site))
    return max(max(found) if recipe.per_block else sum(found) for found in steps.values())


def _nothing_more(job: Job, recipe: Recipe) -> Job:
    """The job that leaves all units where hidden channels have paid the budget to within a step."""
    step = _largest_step(job, recipe)
    note = f"the hidden channels leave {job.budget.target:,} parameters of the budget, less than one step of {step:,}"
    counts = {site.key: site.n_units for site in job.sites}
    return replace(job, counts=counts, step=step, notes=[*job.notes, f"{note}: no units went"])


def prepare_(
    model: PreTrainedModel,
    recipe: Recipe,
    nested: Nested | None = None,
    narrow_hidden: NarrowHidden | None = None,
    counts: Counts | None = None,
) -> Job:
    """The plan of a recipe, after giving consumers a bias and removing hidden channels where the recipe says so.

    Args:
        model: dense.
        recipe: the whole of it.
        nested: units that each site must lose at least and may lose at most.
        narrow_hidden: removes hidden channels; without it a recipe that says so is refused.
        counts: units that stay, where they were decided beforehand.

    Raises:
        BudgetError: whole units cannot meet the budget; biases are taken back, hidden channels are not.
        RecipeError: the recipe removes hidden channels where that cannot be done; the model is as it was.
    """
    sites, added, notes = with_biases_(model, recipe)
    try:
        job = _narrowed(model, recipe, nested, narrow_hidden, counts)
    except (BudgetError, RecipeError):
        remove_biases_(model, sites)
        raise
    return replace(job, added=added, notes=[*job.notes, *notes])


def with_biases_(model: PreTrainedModel, recipe: Recipe) -> tuple[list[Site], int, list[str]]:
    """The sites whose consumer got a bias because the recipe says so, the parameters added, and what to tell of it."""
    sites, without = missing_biases(model, recipe.sites)
    kind = model.config.model_type
    if not recipe.bias:
        return [], 0, _useless(kind, recipe, sites, without)
    refused = unbiased_sites(model.config, readers_of(recipe.targets))
    sites, notes = [site for site in sites if site.name not in refused], []
    added = add_biases_(model, sites)
    if added:
        flags = dict.fromkeys(site.spec.bias[0] for site in sites if site.spec.bias)
        notes.append(f"{added:,} bias parameters were added ({', '.join(flags)}), for repairs to use")
    for name, reader in refused.items():
        if name in recipe.sites and name not in without:
            notes.append(f"{reader} has no bias for {name} of {kind}, so repairs there add none")
    if without:
        notes.append(f"{kind}: its config gives {' and '.join(without)} no bias, so repairs there have none")
    return sites, added, notes


def _useless(kind: str, recipe: Recipe, could: list[Site], cannot: list[str]) -> list[str]:
    """What to tell of a reconstruction that changes only biases, where consumers have none."""
    names = sorted({site.name for site in could} | set(cannot))
    if not RECONSTRUCTIONS[recipe.reconstruction].only_biases or not names:
        return []
    way = f"; --bias gives {' and '.join(sorted({site.name for site in could}))} one" if could else ""
    return [
        f"{kind}: {' and '.join(names)} have no bias, so reconstruction {recipe.reconstruction!r} changes nothing "
        f"there{way}"
    ]


def _narrowed(
    model: PreTrainedModel,
    recipe: Recipe,
    nested: Nested | None,
    narrow_hidden: NarrowHidden | None,
    counts: Counts | None,
) -> Job:
    """The plan of a recipe, after removing hidden channels where it says so."""
    if not recipe.hidden or narrow_hidden is None:
        return plan_counts(model, recipe, nested, counts=counts)
    dense = dense_sizes(model)
    keep = hidden_width(int(model.config.hidden_size), recipe, dense.parameters)
    own = architecture_of(model.config)
    readers = readers_of(recipe.targets)
    if recipe.per_block and readers:
        raise RecipeError(
            f"no hidden channels can go where blocks differ in width and {' and '.join(readers)} must open the result: "
            "leave --hidden or --per-block out, or those programs out of --for"
        )
    opens = own.hidden_stock and all(spec.stock for spec in own.sites)
    if opens or recipe.per_block:
        narrow_hidden(model, keep)
    if not recipe.per_block and not (opens and stock_config(model.config, {}, readers)):
        raise RecipeError(
            f"{model.config.model_type}: no stock config can say {keep} hidden channels with these heads: leave "
            "--hidden out, choose another share, or say --per-block (opens with prunelm.load)"
        )
    return plan_counts(model, recipe, nested, dense, counts)


def first_channels_(shapes: PreTrainedModel, keep: int) -> None:
    """Remove all but the first hidden channels: for models of which only the shapes matter."""
    narrow_hidden_(shapes, torch.arange(keep, device="cpu"))


def decide(job: Job, recipe: Recipe, *measured: Measured) -> Job:
    """The job with its counts, by the recipe's allocator and what that needs.

    Raises:
        BudgetError: whole units cannot meet the budget, or blocks would differ where a stock config says one number.
    """
    counts, step = ALLOCATORS[recipe.allocator](job.sites, job.budget, *measured)
    check_held(
        job.sites, lambda site: counts.get(site.key, site.n_units), job.budget.legal,
        spoken(recipe.targets, recipe.tensor_parallel),
    )  # fmt: skip
    notes = list(job.notes)
    if not recipe.per_block:
        _check_uniform(job.everything, counts)
        notes += _relabeled(job.sites, counts, recipe)
    return replace(job, counts=counts, step=step, notes=notes)


def _relabeled(sites: list[Site], counts: Counts, recipe: Recipe) -> list[str]:
    """What to tell where only another model type can say the widths that stay."""
    readers, config = readers_of(recipe.targets), sites[0].config
    values = {name: value for site in sites for name, value in site.config_values(counts[site.key]).items()}
    written = stock_config(config, values, readers)
    why = None if written is None else why_relabeled(config, written, readers)
    return [] if why is None else [why]


def _check_uniform(sites: list[Site], counts: Counts) -> None:
    """Raise if blocks would end with different widths, which no stock config can say."""
    for name in dict.fromkeys(site.name for site in sites):
        widths = {counts.get(site.key, site.n_units) for site in sites if site.name == name}
        if len(widths) > 1:
            raise BudgetError(
                f"blocks would keep from {min(widths)} to {max(widths)} units of {name}, and a stock config says one "
                "number for all. Say --per-block (opens with trust_remote_code or prunelm.load), or use --allocator "
                "uniform on all blocks."
            )
