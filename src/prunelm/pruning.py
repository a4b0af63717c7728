"""The whole method: budget, then block by block refit, score, narrow."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .criteria import CRITERIA, Statistics
from .data import Batches
from .errors import CalibrationError, RecipeError
from .job import Job, plan_counts
from .moments import CrossMoments, Moments
from .plan import Plan, top_units
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .similarity import head_similarity
from .sites import Site, bias_of, by_block, find_blocks, narrow_, set_weight_, weight_of
from .stream import BlockStream

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that tells nobody."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, in numbers.

    `sites`: per site the kept units out of how many and the errors measured; `notes`: what a user must know.
    """

    recipe: Recipe
    plan: Plan
    sites: dict[str, dict[str, Any]]
    parameters_before: int
    parameters_after: int
    prunable: int
    calibration: dict[str, Any]
    notes: list[str]
    seconds: float

    @property
    def sparsity_of_blocks(self) -> float:
        """Share of the prunable parameters of the blocks that went."""
        return (self.parameters_before - self.parameters_after) / self.prunable

    @property
    def sparsity_of_model(self) -> float:
        """Share of all the parameters that went."""
        return 1 - self.parameters_after / self.parameters_before


@torch.no_grad()
def prune_(
    model: PreTrainedModel,
    calibration: Batches,
    recipe: Recipe,
    *,
    refit: Batches | None = None,
    progress: Progress = silent,
) -> Report:
    """Remove `recipe.sparsity` of the model's prunable parameters, in place, without training.

    Args:
        model: any model of a known family, in eval mode.
        calibration: what criteria read.
        recipe: every choice that changes the numbers.
        refit: what covariances are taken from, for the Gaussian second moment and for refits; the same as
            `calibration` by default.
        progress: told about every block.

    Raises:
        BudgetError: whole units cannot meet the budget; nothing was changed.
        CalibrationError: statistics are not finite or cannot determine a refit; names the block.
    """
    start = time.perf_counter()
    job = plan_counts(model, recipe)
    before = sum(p.numel() for p in model.parameters())
    work = _Work(model, calibration, refit, recipe, job)
    groups = by_block(job.sites)
    last = max(groups)
    for i in range(last + 1):
        progress("pruning", i, last + 1)
        work.block_(i, groups.get(i, []), advance=i < last)
    progress("pruning", last + 1, last + 1)
    plan = Plan(work.kept)
    plan.check(job.sites, job.budget, job.step)
    if not recipe.per_block:
        share_config_(model, job)
    return Report(
        recipe=recipe,
        plan=plan,
        sites=work.report,
        parameters_before=before,
        parameters_after=sum(p.numel() for p in model.parameters()),
        prunable=job.prunable,
        calibration={"criterion": calibration.facts, "refit": (refit or calibration).facts},
        notes=job.notes,
        seconds=time.perf_counter() - start,
    )


def share_config_(model: PreTrainedModel, job: Job) -> None:
    """Give the model's config the widths that all blocks now have, and every block that config again."""
    for site in job.sites:
        for name, value in site.config_values(job.counts[site.key]).items():
            setattr(model.config, name, value)
    _, blocks = find_blocks(model)
    for module in blocks.modules():
        if hasattr(module, "config"):
            module.config = model.config


class _Work:
    """The streams and results of one run; one block at a time."""

    def __init__(
        self, model: PreTrainedModel, calibration: Batches, refit: Batches | None, recipe: Recipe, job: Job
    ) -> None:
        self.model, self.recipe, self.job = model, recipe, job
        self.kept: dict[str, Tensor] = {}
        self.report: dict[str, dict[str, Any]] = {}
        self.owed = 0
        self.drifted = False
        self.refit = RECONSTRUCTIONS[recipe.reconstruction] if recipe.reconstruction != "none" else None
        batches = list(calibration.batches)
        self.scored = range(len(batches))
        self.sequences = sum(len(batch["input_ids"]) for batch in batches)
        self.fitted = self.scored
        if refit is not None:
            batches += refit.batches
            self.fitted = range(len(self.scored), len(batches))
        self.needs = {s.name: self._needs(s) for s in job.sites}
        reads = any(self.needs.values()) or self.refit is not None
        self.stream = BlockStream(model, batches if reads else [])
        self.dense = self.stream.fork() if self.refit is not None else None

    def _needs(self, site: Site) -> frozenset[str]:
        scoring = self.recipe.scoring(site.name)
        needs = CRITERIA[scoring.criterion].needs(**scoring.options)
        if "similarity" in needs and site.spec.probabilities is None:
            raise RecipeError(f"criterion {scoring.criterion!r} compares heads, and {site.name} has none")
        return needs

    def block_(self, i: int, sites: Sequence[Site], *, advance: bool) -> None:
        """Prune the sites of block `i` and carry the streams through it."""
        if self.recipe.order == "one-shot":
            self._one_shot_(i, sites, advance)
            return
        original = copy.deepcopy(self.stream.blocks[i]) if self.dense is not None and sites else None
        passed = False
        for site in sites:
            moments = None
            if self.dense is not None and original is not None and self.drifted:
                passed = site is sites[-1]
                moments = self._refit_(i, site, self.dense, original, advance=passed)
            if self._untouched(site):
                self._keep_all(site)
                continue
            statistics = self._statistics(i, site, moments)
            self._narrow_(site, self._score(site, statistics), statistics)
            self.drifted = True
        if advance:
            self._advance(i, original, passed)

    def _untouched(self, site: Site) -> bool:
        """Whether the plan takes nothing from the site, so that it need not be scored."""
        return not self.recipe.per_block and self.job.counts[site.key] == site.n_units

    def _keep_all(self, site: Site) -> None:
        entry = self.report.setdefault(site.key, {})
        entry |= {"units": site.n_units, "kept": site.n_units, "removed_energy": 0.0}
        self.kept[site.key] = torch.arange(site.n_units)

    def _advance(self, i: int, original: nn.Module | None, passed: bool) -> None:
        """Carry both streams through block `i`; the dense one through its dense weights, unless it has passed."""
        if self.dense is not None and self.drifted and not passed:
            for b in self.fitted:
                self.dense.hidden[b] = self.dense.run(i, b, original)
        self.stream.advance(i)
        if self.dense is not None and not self.drifted:
            self.dense.hidden = list(self.stream.hidden)

    def _one_shot_(self, i: int, sites: Sequence[Site], advance: bool) -> None:
        """Prune by statistics of the dense model: one pass over the block for all its sites."""
        for site in [site for site in sites if self._untouched(site)]:
            self._keep_all(site)
        sites = [site for site in sites if not self._untouched(site)]
        similar = {site.key: self._similarity(i, site) for site in sites if "similarity" in self.needs[site.name]}
        seen = self._observe(i, sites, advance=advance)
        for site in sites:
            consumer, producer = seen[site.key]
            statistics = Statistics(
                consumer=consumer, producer=producer, similarity=similar.get(site.key), seed=self.recipe.seed
            )
            self._narrow_(site, self._score(site, statistics), statistics)

    def _statistics(self, i: int, site: Site, moments: tuple[Moments, Moments] | None) -> Statistics:
        """What the site's criterion reads, measured on the stream as it now is."""
        if moments is not None and self.fitted is self.scored:
            producer, consumer = moments
        else:
            consumer, producer = self._observe(i, [site], advance=False)[site.key]  # type: ignore[assignment]
        similarity = self._similarity(i, site) if "similarity" in self.needs[site.name] else None
        return Statistics(consumer=consumer, producer=producer, similarity=similarity, seed=self.recipe.seed)

    def _similarity(self, i: int, site: Site) -> Tensor:
        recipe = self.recipe
        assert site.spec.probabilities is not None
        return head_similarity(
            self.stream,
            i,
            site.spec.probabilities,
            sequences=min(recipe.similarity_sequences, self.sequences),
            rows=recipe.similarity_rows,
            skip=recipe.similarity_skip,
            exclude_sink=recipe.exclude_sink,
        )

    def _observe(
        self, i: int, sites: Sequence[Site], *, advance: bool
    ) -> dict[str, tuple[Moments | None, Moments | None]]:
        """Moments of the consumer's and the producers' inputs of some sites, as far as their criteria need them.

        The covariance of the producers' input is read from the batches for refits, where those are others.
        """
        wanted: dict[tuple[str, str], tuple[str, Moments]] = {}
        for site in sites:
            for need in self.needs[site.name] & {"consumer", "producer"}:
                path = site.spec.consumer[0] if need == "consumer" else _first_producer(site)
                channels = weight_of(site.root.get_submodule(path)).shape[1]
                wanted[site.key, need] = (path, Moments(channels, full=need == "producer"))
        for b in range(len(self.stream.batches)):
            now = [w for (_, need), w in wanted.items() if b in (self.fitted if need == "producer" else self.scored)]
            if now or advance:
                found = self.stream.capture(i, b, [path for path, _ in now], advance=advance)
                for (_, moments), a in zip(now, found, strict=True):
                    moments.update(a)
        for (key, _), (_, moments) in wanted.items():
            moments.check(f"block {i}, {key}")
        none = ("", None)
        return {
            site.key: (wanted.get((site.key, "consumer"), none)[1], wanted.get((site.key, "producer"), none)[1])
            for site in sites
        }

    def _refit_(
        self, i: int, site: Site, dense: BlockStream, original: nn.Module, *, advance: bool
    ) -> tuple[Moments, Moments]:
        """Refit the producers, then the consumer, to the dense outputs; the moments of both layers' inputs now.

        Source: arXiv 2407.19126, Algorithms 1, 3 and 4 (steps 1 and 2).
        """
        assert self.refit is not None
        block = self.stream.blocks[i]
        entry, (exit_, _) = _first_producer(site), site.spec.consumer
        step1 = self._cross(i, entry, dense, original, None, advance=False)
        step1.x.check(f"block {i}, {site.key}")
        for path in site.spec.producers:
            if path not in site.spec.normed:
                layer = block.get_submodule(path)
                weight, bias = weight_of(layer), bias_of(layer)
                set_weight_(layer, *self.refit(weight, bias, step1.mapped(weight, bias), ridge=self.recipe.ridge))
        layer = block.get_submodule(exit_)
        step2 = self._cross(i, exit_, dense, original, original.get_submodule(exit_), advance=advance)
        step2.x.check(f"block {i}, {site.key}")
        before = step2.residual(weight_of(layer), bias_of(layer))
        refitted = self.refit(weight_of(layer), bias_of(layer), step2, ridge=self.recipe.ridge)
        set_weight_(layer, *refitted)
        self.report[site.key] = {"drift_error": before, "refit_error": step2.residual(*refitted)}
        return step1.x, step2.x

    def _cross(
        self,
        i: int,
        path: str,
        dense: BlockStream,
        original: nn.Module,
        through: nn.Module | None,
        *,
        advance: bool,
    ) -> CrossMoments:
        """Moments of a layer's drifted input with its dense input, or with what `through` makes of the dense input."""
        moments: CrossMoments | None = None
        for b in self.fitted:
            (target,) = dense.capture(i, b, [path], block=original, advance=advance)
            (x,) = self.stream.capture(i, b, [path])
            if through is not None:
                bias = bias_of(through)
                target = nn.functional.linear(target, weight_of(through), bias)
            if moments is None:
                moments = CrossMoments(target.shape[1], x.shape[1])
            moments.update(target, x)
        assert moments is not None
        return moments

    def _score(self, site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
        scoring = self.recipe.scoring(site.name)
        scores = CRITERIA[scoring.criterion](site, statistics, **scoring.options)
        if scores.shape != (site.n_units,) or not bool(torch.isfinite(scores).all()):
            raise CalibrationError(
                f"block {site.block}, {site.key}: criterion {scoring.criterion!r} gave "
                f"{int((~torch.isfinite(scores)).sum())} non-finite scores for {site.n_units} units"
            )
        return scores

    def _narrow_(self, site: Site, scores: Float[Tensor, " unit"], statistics: Statistics) -> None:
        keep = self._keep(site, int((scores < 0).sum()))
        kept = top_units(scores, keep, site.strata)
        entry = self.report.setdefault(site.key, {})
        entry |= {"units": site.n_units, "kept": len(kept)}
        if statistics.consumer is not None:
            entry["removed_energy"] = removed_energy(site, statistics.consumer, kept)
        narrow_(site, kept)
        self.kept[site.key] = kept

    def _keep(self, site: Site, demanded: int) -> int:
        """How many units stay: the plan's number, less where a criterion demands more, made up for by later FFNs."""
        planned = self.job.counts[site.key]
        if not self.recipe.per_block:
            return planned
        floor = max(site.n_units - demanded, self.recipe.min_units * site.strata, planned - self._affordable(site))
        keep = min(planned, floor + -floor % site.strata)
        self.owed += (planned - keep) * site.cost
        if self.owed > 0 and site.spec.probabilities is None:
            options = [site.n_units - o for o in self.job.budget.options(site)]
            wanted = planned + -(-self.owed // site.cost)
            keep = min((o for o in options if o >= wanted), default=site.n_units)
            self.owed -= (keep - planned) * site.cost
        return keep

    def _affordable(self, site: Site) -> int:
        """Units beyond the plan that FFNs from this block on can make up for by losing less than planned."""
        later = [s for s in self.job.sites if s.block >= site.block and s.spec.probabilities is None]
        payable = sum((s.n_units - self.job.counts[s.key]) * s.cost for s in later if s.key not in self.kept)
        return max(0, payable - self.owed) // site.cost


def _first_producer(site: Site) -> str:
    """The path of the layer whose input all producers share."""
    return next(iter(site.spec.producers))


def removed_energy(site: Site, moments: Moments, kept: Tensor) -> float:
    """E||sum of removed units' output||^2 / E||whole output||^2: the module's relative error without any repair.

    Exact where the whole Gram matrix was kept; otherwise channels are taken as uncorrelated.
    """
    weight = weight_of(site.consumer.layer).double()
    gone = torch.ones(weight.shape[1], dtype=torch.bool)
    gone[site.consumer.keep(kept)] = False
    if moments.full:
        energy = ((weight[:, gone] @ moments.gram[gone][:, gone]) * weight[:, gone]).sum()
        whole = ((weight @ moments.gram) * weight).sum()
    else:
        per_channel = weight.square().sum(0) * moments.gram
        energy, whole = per_channel[gone].sum(), per_channel.sum()
    return float(energy / whole.clamp_min(1e-300))
