"""Prune to a size that has to be found first: by looking at the dense model, or by pruning and measuring."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation import Outlook, look_at
from .calibration import fingerprint
from .data import Batches
from .distributed import agreed_data
from .errors import BudgetError
from .job import prepare_
from .journal import Journal
from .limits import AtMost, Fit, Limit, MaxPerplexity, Speedup
from .loading import Source, skeleton
from .perplexity_limit import Held, Pruned, check_causal, perplexity_on, rounded_, within
from .plan import Decided
from .plan_file import PlanFile
from .progress import Progress, named, silent
from .pruning import prune_
from .recipe import Recipe
from .sizing import Sized, Sizer, sized
from .speed_limit import sped
from .stream import Room
from .workbench import Step, Workbench


def sized_by(
    plan: str | Path | None,
    limit: Limit | None,
    source: Source,
    recipe: Recipe,
    outlook: Outlook | None = None,
    progress: Progress = silent,
) -> Sized:
    """The recipe at the size that a plan or a limit says; as it is where there is neither.

    Raises:
        BudgetError: both are given, the plan has lines that cannot be used, or the limit cannot be met.
        CheckpointError: the plan cannot be read, or is for another model.
    """
    if plan is not None:
        if limit is not None:
            raise BudgetError(f"--plan {plan} says a size already: leave the other budget ({limit.said}) out.")
        read = PlanFile(plan)
        read.check_model(fingerprint(source))
        planned, decided = read.decided(skeleton(source))
        return Sized(recipe=planned, decided=decided, asked={**read.data.get("asked", {}), "plan": read.path.name})
    if isinstance(limit, AtMost | Fit):
        return sized(limit, source, recipe, outlook)
    if isinstance(limit, Speedup):
        return sped(limit, source, recipe, outlook, progress)
    return Sized(recipe=recipe)


@dataclass(frozen=True, kw_only=True)
class Run:
    """All of a pruning but its size: the model, what it is calibrated on, and what keeps its steps.

    `recipe` is as the user said it; `outlook` what was seen of the dense model before, if anything; `room` where its
    blocks are.
    """

    source: Source
    load: Callable[[], PreTrainedModel]
    recipe: Recipe
    calibration: Batches
    refit: Batches | None
    outlook: Outlook | None
    journal: Journal | None
    bench: Workbench
    room: Room
    progress: Progress

    def look(self, dense: PreTrainedModel, recipe: Recipe) -> Outlook:
        """What the dense model shows, seen once."""
        bench = self.bench.part("look")
        job = prepare_(dense, recipe)
        known = (self.progress, self.journal, bench, self.refit)
        return self.outlook or look_at(dense, self.calibration, recipe, job, *known)[0]

    def at(
        self, dense: PreTrainedModel, size: Sized, outlook: Outlook | None, bench: Workbench, progress: Progress
    ) -> Pruned:
        """The model, pruned in place to a size that was found, and the report."""
        options: dict[str, Any] = {"refit": self.refit, "outlook": outlook, "decided": size.decided}
        options |= {"journal": self.journal, "bench": bench, "room": self.room, "progress": progress}
        report = prune_(dense, self.calibration, size.recipe, **options)
        return dense, replace(report, asked=dict(size.asked), notes=[*size.notes, *report.notes])


def found_by_looking(size: Sized, limit: Limit | None) -> bool:
    """Whether the size for a limit is known only after a look at the dense model."""
    return limit is not None and size.decided is None and size.recipe.decides_by_looking


def prune_sized(run: Run, dense: PreTrainedModel, size: Sized, limit: Limit | None) -> Pruned:
    """Prune to the size that was found already, or to one that is found by a look at the dense model."""
    outlook = run.outlook
    looks = found_by_looking(size, limit)
    if looks:
        outlook = run.look(dense, size.recipe)
        dense = run.load() if size.recipe.bias else dense

    def found() -> Sized:
        return sized_by(None, limit, run.source, run.recipe, outlook, run.progress) if looks else size

    now = as_before(run.bench, found) if isinstance(limit, Speedup) else found()
    return run.at(dense, now, outlook, run.bench, run.progress)


def as_before(bench: Workbench, find: Callable[[], Sized]) -> Sized:
    """A size found by measuring, which no two runs find alike: that of the run begun before, and of the first process.

    Finished blocks are of that size, so it is kept beside them.
    """
    step = bench.get("size")
    if step is None:
        found = find()
        counts = found.decided.counts if found.decided is not None else None
        facts = {"recipe": found.recipe.to_dict(), "counts": counts, "asked": found.asked, "notes": found.notes}
        step = Step(facts=agreed_data(facts))
        bench.put("size", step)
    said = step.facts
    decided = Decided(counts=said["counts"]) if said["counts"] is not None else None
    return Sized(recipe=Recipe.from_dict(said["recipe"]), decided=decided, asked=said["asked"], notes=said["notes"])


def prune_within(
    run: Run,
    dense: PreTrainedModel,
    limit: MaxPerplexity,
    *,
    held: Held,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
) -> Pruned:
    """The smallest model found within a perplexity, measured with its weights as they are written.

    The dense model is looked at once, where the recipe looks; the journal keeps that search only. Trials are kept on
    the bench: an interrupted run makes the one that it was at again, and prunes to the size it finds.

    Raises:
        BudgetError: not a causal model, or nothing that was tried is within the limit.
        DataError: the held-out text fills no window.
    """
    check_causal(dense, limit)
    windows = held.windows(dense, tokenizer)
    start = perplexity_on(dense, windows, held.name)
    outlook = run.look(dense, run.recipe) if run.recipe.decides_by_looking else run.outlook
    del dense
    sizer = Sizer(run.source, run.recipe, outlook)

    begun: list[str] = []

    def prune(sparsity: float) -> Pruned:
        size = Sized(recipe=replace(run.recipe, sparsity=sparsity))
        if outlook is not None and run.recipe.decides_by_looking:
            trial = sizer.at(sizer.target_of(sparsity))
            size = Sized(recipe=trial.recipe, decided=Decided(counts=trial.counts))
        trials, name = replace(run, journal=None), f"{sparsity:.4g}"
        for earlier in begun:
            run.bench.drop(f"at-{earlier}")
        begun[:] = [name]
        return trials.at(run.load(), size, outlook, run.bench.part(f"at-{name}"), named(run.progress, name))

    def measure(model: PreTrainedModel) -> float:
        rounded_(model, dtype)
        return perplexity_on(model, windows, held.name)

    model, report, asked = within(
        limit,
        run.recipe,
        dense=start,
        prune=prune,
        measure=measure,
        most=sizer.recipe_at(sizer.top).sparsity,
        text=held.name,
        journal=run.bench.journal("trials"),
        progress=run.progress,
    )
    return model, replace(report, asked={**asked, "windows": len(windows), "length": len(windows[0])})
