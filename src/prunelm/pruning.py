"""The whole method: budget, then block by block refit, score, narrow."""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .allocation import Outlook, allocated, look
from .consumer_repair import ConsumerRepair
from .criteria import CRITERIA
from .curves import curves_data, traced, upper_triangle
from .data import Batches
from .depth import drop_blocks_
from .derivatives import Derivatives, derivatives_of
from .errors import BudgetError, RecipeError
from .fusion import with_fusion
from .heap import release_memory
from .hidden import shapes_of
from .hidden_pruning import remove_hidden_
from .job import Job, first_channels_, prepare_, with_biases_
from .journal import Journal
from .layer_outputs import LayerOutputs
from .moments import Moments, output_energy
from .natural_gradient import Aim, aim_of, natural_steps_
from .observation import Observed, first_producer, observe, observe_pair
from .placement import devices_of, exact
from .plan import Budget, Decided, Nested, Plan, prunable, top_units
from .probable import least_probable_blocks
from .progress import Progress, silent
from .reading import Reading, reading
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .repetition import repetition_notes
from .sites import Site, bias_of, by_block, find_blocks, find_sites, narrow_, set_weight_, weight_of
from .stream import BlockStream, Room
from .survey import curve_of, score, similarity_of
from .workbench import Step, Workbench

NO_EXCHANGES = (
    "no units were exchanged: which ones stay was decided before, by a saved calibration, a plan, or for several sizes "
    "whose units are nested"
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done to a model, in numbers.

    `added`: bias parameters that the recipe asked for, part of `parameters_after`; `dropped_blocks`: those of the dense
    model that went whole. `sites`: per site the kept units out of how many, and the errors measured; `notes`: what a
    user must know; `curves`: what `curves.json` says; `asked`: a budget in other units, and what was found of it.
    `hidden`: what was done to the hidden channels, if anything, and `outside`: the parameters that went with them and
    belong to no unit. `device`: where it was computed, and `compute_dtype`: in what; `dtypes`: other data types than
    the usual, of what is written (`dtype`) and of what a streamed run keeps (`scratch_dtype`, `statistics_dtype`).
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
    added: int = 0
    dropped_blocks: list[int] = field(default_factory=list)
    outside: int = 0
    hidden: dict[str, Any] | None = None
    curves: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    compute_dtype: str = "float32"
    dtypes: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity_of_blocks(self) -> float:
        """Share of the prunable parameters of the blocks that went."""
        return (self.parameters_before + self.added - self.outside - self.parameters_after) / self.prunable

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
    outlook: Outlook | None = None,
    nested: Nested | None = None,
    derivatives: Derivatives | None = None,
    aim: Aim | None = None,
    decided: Decided | None = None,
    journal: Journal | None = None,
    bench: Workbench | None = None,
    room: Room | None = None,
    progress: Progress = silent,
) -> Report:
    """Remove `recipe.sparsity` of the model's prunable parameters, in place, without retraining.

    Args:
        model: any model of a known family, in eval mode.
        calibration: what criteria and repairs read; the share `recipe.held_out` of its sequences judges the repairs.
        recipe: every choice that changes the numbers.
        refit: what covariances of the Gaussian second moment and of refits are from; `calibration` by default.
        outlook: what was seen of the dense model before; its scores choose the units, unless `nested` has some to
            choose among.
        nested: units that each site must lose at least and may lose at most, and those to choose among, where this is
            one size of a family.
        derivatives: what backward passes of the dense model gave before.
        aim: of the recipe's steps of natural gradient, taken from the dense model before.
        decided: how many units stay in each site, in place of the allocator's plan, and of some sites which.
        journal: of the search for widths, where the recipe makes one; kept on the bench by default.
        bench: where finished steps are kept, and read from when they were made before.
        room: where blocks and hidden states are, if not in memory.
        progress: told about every block.

    Raises:
        BudgetError: whole units cannot meet the budget; nothing was changed.
        RecipeError: hidden channels are to go where they cannot; nothing was changed.
        CalibrationError: statistics are not finite or cannot determine a refit; names the block.
    """
    start, before = time.perf_counter(), sum(p.numel() for p in model.parameters())
    bench = bench or Workbench()
    if recipe.hidden and (outlook is not None or nested is not None):
        raise RecipeError("hidden channels do not go with an outlook of the dense model or a family: leave one out")
    job, hidden = _prepared_(model, calibration, recipe, nested, decided, bench, progress)
    job.notes.extend(repetition_notes(calibration.facts))
    read = reading(calibration, refit, recipe, job.sites)
    if derivatives is None and (outlook is None or decided is not None):
        derivatives = derivatives_of(model, read, job.sites, recipe, room, bench)
        recipe, notes = with_fusion(model, read, recipe, job, derivatives, bench, progress)
        job.notes.extend(notes)
    derivatives = derivatives or Derivatives()
    among = nested.among if nested is not None else None
    stream, seen = BlockStream(model, read.batches, room), outlook
    if seen is None and (job.counts is None or recipe.policy is not None):
        known: dict[str, Any] = {"derivatives": derivatives, "journal": journal, "bench": bench, "progress": progress}
        seen = look(stream.fork(), read, recipe, job, **known)
    if seen is not None and recipe.drops_blocks:
        return _without_blocks(model, job, seen, recipe, calibration, before, start)
    if seen is not None:
        job = allocated(job, recipe, seen)
    scores = _known_scores(seen, job, recipe, decided, nested=outlook is not None and among is None)
    if recipe.exchanges and (scores or among is not None):
        job.notes.append(NO_EXCHANGES)
    work = _Work(
        stream,
        read,
        recipe,
        job,
        scores=scores,
        derivatives=derivatives,
        seen=seen,
        exact=decided is not None,
        among=among,
    )
    _carry_out_(work, bench, progress, aim)
    return replace(_reported(work, calibration, refit, before, start, model), hidden=hidden or None)


def _prepared_(
    model: PreTrainedModel,
    calibration: Batches,
    recipe: Recipe,
    nested: Nested | None,
    decided: Decided | None,
    bench: Workbench,
    progress: Progress,
) -> tuple[Job, dict[str, Any]]:
    """The plan, after the hidden channels have gone that the recipe removes, and what was done to those."""
    hidden: dict[str, Any] = {}

    def remove_(whole: PreTrainedModel, keep: int) -> None:
        hidden.update(remove_hidden_(whole, calibration, recipe, keep, bench, progress))

    if recipe.hidden:
        prepare_(shapes_of(model), recipe, narrow_hidden=first_channels_)
    counts = decided.counts if decided is not None else None
    return prepare_(model, recipe, nested, remove_, counts), hidden


def _known_scores(
    seen: Outlook | None, job: Job, recipe: Recipe, decided: Decided | None, *, nested: bool
) -> Mapping[str, Tensor]:
    """Scores from before, which keep the sizes of a family `nested`; those of a policy and a plan are what they say."""
    scores: Mapping[str, Tensor] = {}
    if seen is not None and ((nested and decided is None) or recipe.policy is not None):
        scores = seen.survey.scores
    return scores if decided is None else {**scores, **decided.scores(job.sites)}


@torch.no_grad()
def repair_(
    model: PreTrainedModel,
    calibration: Batches,
    recipe: Recipe,
    kept: Mapping[str, Tensor],
    *,
    notes: Sequence[str] = (),
    bench: Workbench | None = None,
    progress: Progress = silent,
) -> Report:
    """Remove from a dense model, in place, exactly what another pruning of it removed, and repair what stays.

    Args:
        model: dense, in eval mode.
        calibration: what the repair reads.
        recipe: its reconstruction, biases, held-out share, unit and widths count; its criteria do not.
        kept: the units that stay, by site key; sites that are not named stay whole.
        notes: what a user must know, for the report.
        bench: see `prune_`.
        progress: told about every block.

    Raises:
        CalibrationError: statistics are not finite; names the block.
    """
    start = time.perf_counter()
    before = sum(p.numel() for p in model.parameters())
    _, added, said = with_biases_(model, recipe)
    everything = find_sites(model, recipe.unit)
    sites = [site for site in everything if site.key in kept]
    counts = {site.key: len(kept[site.key]) for site in sites}
    budget = Budget(target=Plan(kept).removed(sites), total=prunable(sites), min_units=0)
    total = prunable(find_sites(model))
    job = Job(
        everything=everything,
        sites=sites,
        budget=budget,
        counts=counts,
        step=1,
        prunable=total,
        added=added,
        notes=[*notes, *said, *repetition_notes(calibration.facts)],
    )
    scores = Decided(counts=counts, kept=kept).scores(sites)
    read = reading(calibration, None, recipe, sites)
    work = _Work(BlockStream(model, read.batches), read, recipe, job, scores=scores, derivatives=Derivatives())
    _carry_out_(work, bench or Workbench(), progress)
    return _reported(work, calibration, None, before, start, model)


def _carry_out_(work: "_Work", bench: Workbench, progress: Progress, aim: Aim | None = None) -> None:
    """Prune block by block, as an earlier run did where it got so far, check the plan, and take the recipe's steps."""
    job, room, steps = work.job, work.stream.room, work.recipe.natural_steps
    if steps and aim is None:
        leaving = work.seen.leaving if work.seen is not None else None
        aim = aim_of(work.stream, work.read, steps, leaving, progress)
    elif aim is not None:
        aim = aim.on(work.stream)
    job.notes.extend(_unjudged(work.read, work.recipe))
    groups = by_block(job.sites)
    last = max(groups)
    for i in range(len(work.stream.blocks)):
        sites, advance = groups.get(i, []), i < last and work.looks
        with room.opened(i):
            if i <= last:
                progress("pruning", i, last + 1)
                step = bench.get(f"block-{i}")
                if step is not None:
                    work.repeat_(i, sites, step, advance=advance)
                else:
                    work.block_(i, sites, advance=advance)
                    bench.put(f"block-{i}", work.step(i, sites))
            room.finished(i)
    progress("pruning", last + 1, last + 1)
    Plan(work.kept).check(job.sites, job.budget, job.step)
    if not work.recipe.per_block:
        share_config_(work.stream.model, job)
    if steps and aim is not None:
        said = natural_steps_(work.stream.model, aim, bench=bench, progress=progress)
        towards = ", from the model without its hidden channels" if work.recipe.hidden else ""
        job.notes.extend(note + towards for note in said)


def _unjudged(read: Reading, recipe: Recipe) -> list[str]:
    """What to know where held-out tokens should judge repairs and there are none."""
    if read.judging.batches or not recipe.held_out or RECONSTRUCTIONS[recipe.reconstruction].stage != "repair":
        return []
    return [
        f"nothing was held out of {read.sequences} calibration sequence{'s' * (read.sequences != 1)}: the ridge is "
        f"{recipe.ridge:g} as given, and no repair was compared with a milder one"
    ]


def _without_blocks(
    model: PreTrainedModel, job: Job, seen: Outlook, recipe: Recipe, calibration: Batches, before: int, start: float
) -> Report:
    """Drop the blocks that a policy found least likely to stay."""
    dropped, step = least_probable_blocks(job.sites, job.budget, seen.survey.scores)
    counted = sum(site.cost * site.n_units for site in job.sites if site.block in dropped)
    if not job.budget.target - step < counted <= job.budget.target:
        raise BudgetError(f"{counted:,} parameters of units would go, and the budget says {job.budget.target:,}")
    drop_blocks_(model, dropped)
    after = sum(p.numel() for p in model.parameters())
    return Report(
        recipe=recipe,
        plan=Plan({}),
        sites={},
        parameters_before=before,
        parameters_after=after,
        prunable=job.prunable,
        calibration={"criterion": calibration.facts, "refit": calibration.facts},
        notes=[*job.notes, *seen.notes],
        seconds=time.perf_counter() - start,
        dropped_blocks=dropped,
        outside=before - after - counted,
        device=devices_of(model),
        compute_dtype=str(model.dtype).removeprefix("torch."),
    )


def _reported(
    work: "_Work", calibration: Batches, refit: Batches | None, before: int, start: float, model: PreTrainedModel
) -> Report:
    job = work.job
    return Report(
        recipe=work.recipe,
        plan=Plan(work.kept),
        sites=work.report,
        parameters_before=before,
        parameters_after=sum(p.numel() for p in model.parameters()),
        prunable=job.prunable,
        calibration={"criterion": calibration.facts, "refit": _without_ngrams((refit or calibration).facts)},
        notes=job.notes,
        seconds=time.perf_counter() - start,
        added=job.added,
        outside=job.outside,
        curves=work.traces(),
        device=devices_of(model),
        compute_dtype=str(model.dtype).removeprefix("torch."),
    )


def _without_ngrams(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same facts without the n-grams, which are said once."""
    return {name: value for name, value in facts.items() if name != "ngrams"}


def share_config_(model: PreTrainedModel, job: Job) -> None:
    """Give the model's config the widths that all blocks now have, and every block that config again."""
    for site in job.sites:
        for name, value in site.config_values(job.keeps(site)).items():
            setattr(model.config, name, value)
    _, blocks = find_blocks(model)
    for module in blocks.modules():
        if hasattr(module, "config"):
            module.config = model.config


class _Work:
    """The streams and results of one run; one block at a time."""

    def __init__(
        self,
        stream: BlockStream,
        read: Reading,
        recipe: Recipe,
        job: Job,
        *,
        scores: Mapping[str, Tensor],
        derivatives: Derivatives,
        seen: Outlook | None = None,
        exact: bool = False,
        among: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.recipe, self.job = recipe, job
        self.exact, self.among = exact, among
        self.kept: dict[str, Tensor] = {}
        prices = seen.report() if seen is not None else {}
        self.report: dict[str, dict[str, Any]] = {s.key: prices[s.key] for s in job.sites if s.key in prices}
        self.seen = seen
        self.found: dict[str, Tensor] = {}
        self.alike: dict[str, list[float]] = {}
        # What a plan removes less than the budget is not given back a second time.
        gone = sum((site.n_units - job.keeps(site)) * site.cost for site in job.sites)
        self.owed = gone - job.budget.target if recipe.per_block and not exact else 0
        self.drifted = False
        self.narrowed: list[str] = []
        self.solved: set[str] = set()
        chosen = RECONSTRUCTIONS[recipe.reconstruction]
        self.refit = chosen if chosen.stage == "refit" else None
        self.read = read
        self.scores, self.derivatives = scores, derivatives
        self.stream = stream
        targets = chosen.stage == "repair" and (recipe.dense_share > 0 or recipe.choose_share)
        self.dense = self.stream.fork() if self.refit is not None or targets else None
        self.looks = chosen.stage != "none" or not all(site.key in scores for site in job.sites)
        self.repair = ConsumerRepair(chosen, stream, self.dense, read, recipe) if chosen.stage == "repair" else None

    def block_(self, i: int, sites: Sequence[Site], *, advance: bool) -> None:
        """Prune the sites of block `i` and carry the streams through it."""
        if self.recipe.order == "one-shot":
            self._one_shot_(i, sites, advance)
            return
        original = copy.deepcopy(self.stream.blocks[i]) if self.dense is not None and sites else None
        passed, attention = False, self._attention_outputs(i, sites) if advance else None
        for site in sites:
            release_memory()
            moments = None
            if self.refit is not None and original is not None and self.drifted:
                passed = site is sites[-1]
                moments = self._refit_(i, site, original, advance=passed)
            if self._untouched(site):
                self._keep_all(site)
                continue
            known = attention if site is sites[-1] else None
            self._prune_(site, self._observed(i, site, moments, known), original)
            self.drifted = True
        if advance:
            self._advance(i, original, passed, attention)

    def _attention_outputs(self, i: int, sites: Sequence[Site]) -> LayerOutputs | None:
        """Of block `i`, which need not run its attention again to advance where that is in front of the last site.

        None where blocks and states are not all in memory.
        """
        paths = [s.spec.probabilities for s in self.job.everything if s.block == i and s.spec.probabilities is not None]
        if self.stream.room.deep is not None or not paths or not sites or sites[-1].spec.probabilities is not None:
            return None
        return LayerOutputs(self.stream.blocks[i].get_submodule(paths[0]))

    def step(self, i: int, sites: Sequence[Site]) -> Step:
        """All that pruning block `i` decided, and the weights that were solved in it."""
        keys = [site.key for site in sites]
        facts = {
            "report": {key: self.report[key] for key in keys if key in self.report},
            "alike": {key: self.alike[key] for key in keys if key in self.alike},
            "narrowed": [key for key in keys if key in self.narrowed],
            "owed": self.owed,
            "drifted": self.drifted,
        }
        tensors = {f"kept/{key}": self.kept[key] for key in keys}
        tensors |= {f"found/{key}": self.found[key] for key in keys if key in self.found}
        for site in sites:
            for path in (*site.spec.producers, site.spec.consumer[0]):
                if f"{i}.{path}" in self.solved:
                    parts = site.root.get_submodule(path).named_parameters()
                    tensors |= {f"solved/{path}.{name}": value for name, value in parts}
        return Step(facts=facts, tensors=tensors)

    def repeat_(self, i: int, sites: Sequence[Site], step: Step, *, advance: bool) -> None:
        """Do to block `i` what an earlier run did, and carry the streams through it."""
        one_shot = self.recipe.order == "one-shot"
        if one_shot and advance:
            self.stream.advance(i)
        original = copy.deepcopy(self.stream.blocks[i]) if self.dense is not None and sites else None
        facts, tensors = step.facts, step.tensors
        for site in sites:
            self.kept[site.key] = tensors[f"kept/{site.key}"]
            if site.key in facts["narrowed"]:
                narrow_(site, self.kept[site.key])
        for name, value in tensors.items():
            kind, _, path = name.partition("/")
            if kind == "found":
                self.found[path] = value
            elif kind == "solved":
                self.stream.blocks[i].get_parameter(path).copy_(value)
        self.report |= facts["report"]
        self.alike |= facts["alike"]
        self.owed, self.drifted = facts["owed"], facts["drifted"]
        if advance and not one_shot:
            self._advance(i, original, passed=False)

    def _untouched(self, site: Site) -> bool:
        """Whether the plan takes nothing from the site, so that it need not be scored."""
        demands = (
            self.recipe.per_block and not self.exact and not CRITERIA[self.recipe.scoring(site.name).criterion].curve
        )
        return self.job.keeps(site) == site.n_units and not demands

    def _keep_all(self, site: Site) -> None:
        entry = self.report.setdefault(site.key, {})
        entry |= {"units": site.n_units, "kept": site.n_units, "removed_energy": 0.0}
        self.kept[site.key] = torch.arange(site.n_units)

    def _advance(self, i: int, original: nn.Module | None, passed: bool, attention: LayerOutputs | None = None) -> None:
        """Carry both streams through block `i`; the dense one through its dense weights, unless it has passed."""
        if self.dense is not None and self.drifted and not passed:
            self.dense.advance(i, original)
        for b in range(len(self.stream.batches)):
            with attention.of(b) if attention is not None else nullcontext():
                self.stream.hidden[b] = self.stream.run(i, b)
        if self.dense is not None and not self.drifted:
            self.dense.hidden = self.stream.hidden.copy()

    def _one_shot_(self, i: int, sites: Sequence[Site], advance: bool) -> None:
        """Prune by statistics of the dense model: one pass over the block for all its sites."""
        for site in [site for site in sites if self._untouched(site)]:
            self._keep_all(site)
        sites = [site for site in sites if not self._untouched(site)]
        unknown = [site for site in sites if not self._known(site)]
        similar = {s.key: self._similarity(s) for s in unknown}
        seen = observe(self.stream, i, unknown, self.read.needs, self.read.places, advance=advance)
        for site in sites:
            self._prune_(site, seen.get(site.key, Observed()), None, similar.get(site.key))

    def _known(self, site: Site) -> bool:
        """Whether the site's scores were given and nothing else has to be measured."""
        return site.key in self.scores and self.repair is None

    def _observed(
        self, i: int, site: Site, moments: tuple[Moments, Moments] | None, known: LayerOutputs | None = None
    ) -> Observed:
        """What the site's criterion and repair read, measured on the stream as it now is."""
        if self._known(site):
            return Observed()
        if moments is not None and self.read.refit is self.read.fit:
            return Observed(producer=moments[0], consumer=moments[1])
        found = observe(self.stream, i, [site], self.read.needs, self.read.places, advance=False, known=known)
        return found[site.key]

    def _prune_(self, site: Site, seen: Observed, original: nn.Module | None, similarity: Tensor | None = None) -> None:
        """Score the site's units, choose, repair the consumer for what goes, narrow."""
        scores = self.scores.get(site.key)
        if scores is None:
            if similarity is None:
                similarity = self._similarity(site)
            scores = score(site, seen, similarity, self.derivatives, self.recipe)
            self.found[site.key] = scores
        keep = self._keep(site, int((scores < 0).sum()))
        kept = top_units(self._last_without(site, scores), keep, site.strata)
        entry = self.report.setdefault(site.key, {})
        entry |= {"units": site.n_units, "kept": len(kept)}
        if seen.consumer is not None:
            entry["removed_energy"] = removed_energy(site, seen.consumer, kept)
        solved = None
        if self.repair is not None:
            before = original if self.drifted else None
            fixed = site.key in self.scores or self.among is not None
            kept, solved, said = self.repair(site, seen, kept, original=before, fixed=fixed)
            entry |= said
        narrow_(site, kept)
        self.narrowed.append(site.key)
        if solved is not None:
            set_weight_(site.consumer.layer, solved.weight, solved.bias)
            self.solved.add(f"{site.block}.{site.spec.consumer[0]}")
        self.kept[site.key] = kept

    def _last_without(self, site: Site, scores: Tensor) -> Tensor:
        """The scores, below all others those of units that the size before has lost."""
        within = (self.among or {}).get(site.key)
        if within is None:
            return scores
        lost = torch.ones(site.n_units, dtype=torch.bool, device=scores.device)
        lost[within.to(lost.device)] = False
        return scores.masked_fill(lost, -math.inf)

    def _similarity(self, site: Site) -> Tensor | None:
        found = similarity_of(self.stream, self.read.fit, site, self.recipe, self.read.needs[site.name])
        if found is not None:
            self.alike[site.key] = upper_triangle(found)
        return found

    def traces(self) -> dict[str, Any]:
        """The curves of all sites that were scored, here or by the outlook, as `curves.json` says them."""
        survey = self.seen.survey if self.seen is not None else None
        curves: dict[str, Tensor] = dict(survey.curves) if survey is not None else {}
        prices = self.seen.prices if self.seen is not None else {}
        sites = {}
        for site in self.job.sites:
            if site.key not in curves and site.key in self.found:
                curves[site.key] = curve_of(site, self.found[site.key], self.recipe)
            if site.key in curves:
                kept = len(self.kept[site.key])
                points = survey.prices.get(site.key, []) if survey is not None else []
                sites[site.key] = traced(
                    site, curves[site.key], kept, self.recipe, points=points, price=prices.get(site.key)
                )
        return curves_data(sites, self.alike)

    def _refit_(self, i: int, site: Site, original: nn.Module, *, advance: bool) -> tuple[Moments, Moments]:
        """Refit the producers, then the consumer, to the dense outputs; the moments of both layers' inputs now.

        Source: arXiv 2407.19126, Algorithms 1, 3 and 4 (steps 1 and 2).
        """
        assert self.refit is not None
        assert self.dense is not None
        block, ridge = self.stream.blocks[i], self.recipe.ridge
        entry, exit_ = first_producer(site), site.spec.consumer[0]
        pair = (self.stream, self.dense, i)
        step1 = observe_pair(*pair, entry, self.read.refit, original=original, through=None, advance=False)
        step1.x.check(f"block {i}, {site.key}")
        for path in site.spec.producers:
            if path not in site.spec.normed:
                layer = block.get_submodule(path)
                weight, bias = weight_of(layer), bias_of(layer)
                all_ = torch.arange(weight.shape[1])
                set_weight_(layer, *self.refit(weight, bias, step1.mapped(weight, bias), all_, ridge=ridge))
                self.solved.add(f"{i}.{path}")
        release_memory()
        layer, through = block.get_submodule(exit_), original.get_submodule(exit_)
        step2 = observe_pair(*pair, exit_, self.read.refit, original=original, through=through, advance=advance)
        step2.x.check(f"block {i}, {site.key}")
        release_memory()
        weight, bias = weight_of(layer), bias_of(layer)
        before = step2.residual(weight, bias)
        refitted = self.refit(weight, bias, step2, torch.arange(weight.shape[1]), ridge=ridge)
        set_weight_(layer, *refitted)
        self.solved.add(f"{i}.{exit_}")
        self.report.setdefault(site.key, {})
        self.report[site.key] |= {"drift_error": before, "refit_error": step2.residual(*refitted)}
        return step1.x, step2.x

    def _keep(self, site: Site, demanded: int) -> int:
        """How many units stay: the plan's number, less where a criterion demands more, made up for by later FFNs."""
        planned = self.job.keeps(site)
        if not self.recipe.per_block or self.exact:
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
        payable = sum((s.n_units - self.job.keeps(s)) * s.cost for s in later if s.key not in self.kept)
        return max(0, payable - self.owed) // site.cost


def removed_energy(site: Site, moments: Moments, kept: Tensor) -> float:
    """E||sum of removed units' output||^2 / E||whole output||^2: the module's relative error without any repair.

    Exact where the whole Gram matrix was kept; otherwise channels are taken as uncorrelated.
    """
    weight = exact(weight_of(site.consumer.layer))
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[site.consumer.keep(kept)] = False
    if moments.full:
        energy = output_energy(weight[:, gone], moments.gram[gone][:, gone])
        whole = output_energy(weight, moments.gram)
    else:
        per_channel = weight.square().sum(0) * moments.gram
        energy, whole = per_channel[gone].sum(), per_channel.sum()
    return float(energy / whole.clamp_min(1e-300))
