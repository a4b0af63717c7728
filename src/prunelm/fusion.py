"""The searched fusion of coarse and fine importance: one weight for each kind of site, by the pruned model's loss."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from .allocators import ALLOCATORS, PER_UNIT
from .criteria import CRITERIA
from .derivatives import Derivatives
from .errors import RecipeError
from .job import Job
from .losses import Objective, objective
from .masking import Mask, masking
from .observation import Observed
from .plan import top_units
from .progress import Progress, silent
from .reading import Reading
from .recipe import Recipe, Scoring
from .survey import Survey, score
from .workbench import Workbench

DERIVED = frozenset({"fisher", "gates", "gradients", "importance"})
"""Statistics that are there before any activation is measured."""
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def with_fusion(
    model: PreTrainedModel,
    read: Reading,
    recipe: Recipe,
    job: Job,
    derivatives: Derivatives,
    bench: Workbench,
    progress: Progress = silent,
) -> tuple[Recipe, list[str]]:
    """The recipe with `fixed` weights in place of `searched`, and a note of what was tried.

    Coordinate descent from 1/2: each kind of site in turn takes the weight of the grid whose plan has the least loss,
    on held-out sequences where there are any. Forward passes only; losses that are on the bench are not measured again.

    Raises:
        RecipeError: the allocator needs more than scores, or another criterion more than gradients.
    """
    kinds = [name for name in recipe.sites if recipe.scoring(name).options.get("fusion") == "searched"]
    if not kinds:
        return recipe, []
    if ALLOCATORS[recipe.allocator].needs not in (None, *PER_UNIT) or recipe.policy is not None:
        raise RecipeError("fusion 'searched' tries whole plans: use allocator 'uniform', 'per-module' or 'global'")
    _check_others(recipe, job)
    judge = objective(
        recipe.loss, model, read.judging if read.judging.batches else read.fitted, unlabeled="kl", seed=recipe.seed
    )
    journal = bench.journal("fusion")
    present = [name for name in kinds if any(site.name == name for site in job.sites)]
    alphas, tried = dict.fromkeys(kinds, 0.5), dict[tuple[float, ...], float]()
    with masking(model, job.sites) as mask:
        for n, name in enumerate(present):
            for m, alpha in enumerate(GRID):
                progress("searching", n * len(GRID) + m, len(present) * len(GRID))
                now = {**alphas, name: alpha}
                key = tuple(now.values())
                if key not in tried:
                    measure = partial(_loss_of, model, mask, job, _fixed(recipe, now), derivatives, judge)
                    tried[key] = journal.entry(lambda measure=measure: {"loss": measure()})["loss"]  # type: ignore[misc]
            alphas[name] = min(GRID, key=lambda a, name=name: (tried[tuple({**alphas, name: a}.values())], a))  # type: ignore[misc]
    progress("searching", 1, 1)
    first, best = tried[tuple(dict.fromkeys(kinds, 0.5).values())], tried[tuple(alphas.values())]
    said = ", ".join(f"{name} {alpha:g}" for name, alpha in alphas.items())
    return _fixed(recipe, alphas), [
        f"fusion weights searched in {len(tried)} plans: {said}; loss {first:.4f} -> {best:.4f}"
    ]


def _check_others(recipe: Recipe, job: Job) -> None:
    """Raise if some sites cannot be scored before activations are measured.

    Raises:
        RecipeError: names the criterion.
    """
    for name in dict.fromkeys(site.name for site in job.sites):
        scoring = recipe.scoring(name)
        if CRITERIA[scoring.criterion].needs(**scoring.options) - DERIVED:
            raise RecipeError(
                f"fusion 'searched' scores every site before activations are measured, and criterion "
                f"{scoring.criterion!r} of {name} reads those: use 'fused' or 'l2' there, or another fusion"
            )


def _fixed(recipe: Recipe, alphas: Mapping[str, float]) -> Recipe:
    """The recipe with these weights."""
    now = {}
    for name, alpha in alphas.items():
        scoring = recipe.scoring(name)
        now[name] = Scoring(criterion=scoring.criterion, options={**scoring.options, "fusion": "fixed", "alpha": alpha})
    return replace(recipe, **now)  # type: ignore[arg-type]


def _loss_of(
    model: PreTrainedModel, mask: Mask, job: Job, recipe: Recipe, derivatives: Derivatives, judge: Objective
) -> float:
    """The loss of the plan that a recipe makes."""
    found = Survey(scores={site.key: score(site, Observed(), None, derivatives, recipe) for site in job.sites})
    chosen, counts = ALLOCATORS[recipe.allocator], job.counts
    if counts is None:
        assert chosen.needs is not None
        counts, _ = chosen(job.sites, job.budget, found.measured(chosen.needs, job.sites, job.budget, recipe))
    kept = {s.key: top_units(found.scores[s.key], counts[s.key], s.strata) for s in job.sites}
    return judge.judged(model, mask, lambda: mask.keep(kept))
