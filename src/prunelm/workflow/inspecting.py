"""What a model's config says alone: its sites, and what a budget would remove; no weight is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..errors import BudgetError
from ..job import Job, first_channels_, plan_counts, prepare_
from ..limits import Limit, MaxPerplexity
from ..loading import find_model, skeleton
from ..plan import prunable
from ..recipe import Recipe
from ..sites import Site, find_sites
from ..sized_pruning import sized_by


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's sites and what usual budgets would mean; no weight was read."""

    name: str
    model_type: str
    parameters: int
    prunable: int
    blocks: int
    sites: list[Site]
    budgets: list[dict[str, Any]]


def inspect(model: str | Path, *, unit: str = "group", **access: Any) -> Inspection:
    """The sites of a model, the cost of their units, and what 10, 20 and 30 % would leave, from its config alone.

    Raises:
        CheckpointError: no such model, or damaged.
        UnsupportedModelError: unknown family.
    """
    source = find_model(model, **access)
    shapes = skeleton(source)
    sites = find_sites(shapes, unit)
    budgets = []
    for sparsity in (0.1, 0.2, 0.3):
        try:
            job = plan_counts(shapes, Recipe(sparsity=sparsity, unit=unit))
        except BudgetError as error:
            budgets.append({"sparsity": sparsity, "error": str(error)})
        else:
            budgets.append({"sparsity": sparsity, **planned(shapes, job)})
    return Inspection(
        name=source.name,
        model_type=shapes.config.model_type,
        parameters=sum(p.numel() for p in shapes.parameters()),
        prunable=prunable(sites),
        blocks=len({site.block for site in sites}),
        sites=sites,
        budgets=budgets,
    )


def planned(model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """What a job will remove: parameters, and the widths that stay.

    Where widths are decided by measurements, `removed` is the budget, met within one unit, and `kept` is empty.
    """
    removed = job.budget.target
    before = sum(p.numel() for p in model.parameters())
    widths: dict[str, list[int]] = {}
    if job.counts is not None:
        removed = sum((site.n_units - job.keeps(site)) * site.cost for site in job.sites)
        for site in job.sites:
            widths.setdefault(site.name, []).append(job.keeps(site))
    if job.narrowed:
        widths["hidden"] = [int(model.config.hidden_size)]
    gone = removed + job.narrowed + job.outside
    return {
        "removed": gone,
        "parameters": before - removed,
        "share_of_blocks": (removed + job.narrowed) / job.prunable,
        "share_of_model": gone / (before + job.narrowed + job.outside),
        "kept": {name: sorted(set(counts)) for name, counts in widths.items()},
        "notes": job.notes,
    }


def dry_run(
    model: str | Path,
    recipe: Recipe,
    *,
    plan: str | Path | None = None,
    limit: Limit | None = None,
    **access: Any,
) -> dict[str, Any]:
    """What `prune` would remove under a recipe, a plan or a limit, from the model's config alone.

    Raises:
        BudgetError: the limit is met by measuring pruned models.
    """
    if isinstance(limit, MaxPerplexity):
        raise BudgetError("--max-ppl is met by measuring pruned models: there is no dry run of that.")
    source = find_model(model, **access)
    size = sized_by(plan, limit, source, recipe)
    counts = size.decided.counts if size.decided is not None else None
    shapes = skeleton(source)
    found = planned(shapes, prepare_(shapes, size.recipe, narrow_hidden=first_channels_, counts=counts))
    return {**found, "notes": [*size.notes, *found["notes"]], "recipe": size.recipe.to_dict()}
