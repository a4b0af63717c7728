"""The sparsity that meets a budget of parameters or bytes, found on a model's shapes."""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFWriter
from transformers import PreTrainedModel

from .allocation import Outlook, allocated
from .criteria import CRITERIA
from .errors import BudgetError, CheckpointError, RecipeError
from .gguf_vocabulary import add_vocabulary
from .job import Job, first_channels_, prepare_, with_counts
from .limits import AtMost, Fit
from .loading import TOKENIZER_FILES, Source, skeleton
from .plan import Counts, Decided, parameters_of
from .recipe import Recipe
from .storage import cache_bytes_of, step_of, stored_after, stored_bytes
from .targets import default_multiple

_HEADER_BYTES = 160
"""What a tensor's name, sizes and padding take in a GGUF file, at most."""


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A recipe with the sparsity that meets a budget, what stays where that was decided, and what was found."""

    recipe: Recipe
    decided: Decided | None = None
    asked: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A recipe planned on a model's shapes, which are those without the hidden channels that went before."""

    recipe: Recipe
    model: PreTrainedModel
    job: Job

    @property
    def counts(self) -> Counts:
        """Units that stay."""
        assert self.job.counts is not None
        return self.job.counts

    @property
    def parameters(self) -> int:
        """Parameters that stay."""
        removed = sum((s.n_units - self.counts[s.key]) * s.cost for s in self.job.sites)
        whole: int = sum(p.numel() for p in self.model.parameters())
        return whole - removed


class Sizer:
    """Plans a recipe for any number of parameters to remove, on shapes alone or by what was seen of the dense model."""

    def __init__(self, source: Source, recipe: Recipe, outlook: Outlook | None = None) -> None:
        if recipe.drops_blocks:
            raise RecipeError(f"recipe {recipe.name!r} drops whole blocks: its size is said by --sparsity only")
        self.source, self.recipe, self.outlook = source, recipe, outlook
        self._shapes = skeleton(source)
        job = prepare_(self._shapes, recipe, narrow_hidden=first_channels_, counts={})
        self.whole = Trial(recipe=recipe, model=self._shapes, job=job)

    def most(self) -> Trial:
        """The narrowest model that the recipe's sites allow."""
        least = {s.key: s.n_units - self.whole.job.budget.options(s)[-1] for s in self.whole.job.sites}
        return replace(self.whole, job=with_counts(self.whole.job, least))

    @property
    def top(self) -> int:
        """Parameters of units that can go at most."""
        return self.whole.parameters - self.most().parameters

    @property
    def looks(self) -> bool:
        """Whether only a look at the dense model decides widths, and there was none yet."""
        return self.outlook is None and self.recipe.decides_by_looking

    def recipe_at(self, target: int) -> Recipe:
        """The recipe with the sparsity that is a budget of so many parameters of units."""
        job = self.whole.job
        gone = job.narrowed + (job.outside if self.recipe.of == "model" else 0)
        return replace(self.recipe, sparsity=min((target + gone + 0.5) / job.budget.asked_of, math.nextafter(1, 0)))

    def target_of(self, sparsity: float) -> int:
        """The parameters of units that are a budget of a sparsity."""
        job = self.whole.job
        gone = job.narrowed + (job.outside if self.recipe.of == "model" else 0)
        return max(1, parameters_of(sparsity, job.budget.asked_of) - gone)

    def at(self, target: int) -> Trial:
        """The plan that removes at most so many parameters of units, and less than a step fewer.

        Raises:
            BudgetError: whole units cannot meet it.
        """
        recipe = self.recipe_at(target)
        model = skeleton(self.source) if recipe.hidden or recipe.bias else self._shapes
        job = prepare_(model, recipe, narrow_hidden=first_channels_)
        if job.counts is None:
            assert self.outlook is not None
            job = allocated(job, recipe, self.outlook)
        return Trial(recipe=recipe, model=model, job=job)

    def smallest_step(self) -> int:
        """The fewest parameters between two plans, where that is the same at every size."""
        budget, kinds = self.whole.job.budget, dict[str, list[int]]()
        for site in self.whole.job.sites:
            kinds.setdefault(site.name, []).append(budget.step(site))
        steps = [min(found) if self.recipe.per_block else sum(found) for found in kinds.values()]
        return min((step for step in steps if step), default=1)


def sized(limit: AtMost | Fit, source: Source, recipe: Recipe, outlook: Outlook | None = None) -> Sized:
    """The recipe at the least sparsity that meets a budget.

    Args:
        limit: parameters or bytes.
        source: the model; only its shapes are read.
        recipe: all but the sparsity.
        outlook: what was seen of the dense model, for recipes that decide widths by it; without it, their sparsity is
            an estimate, at which to look.

    Raises:
        BudgetError: the model meets it already, or cannot with these sites; says what can be asked for.
        RecipeError: the recipe drops whole blocks.
    """
    if isinstance(limit, AtMost):
        return _parameters(limit, Sizer(source, recipe, outlook))
    return _bytes(limit, source, recipe, outlook)


def _parameters(limit: AtMost, sizer: Sizer) -> Sized:
    """Remove what is too much and less than one step more.

    A plan removes in (target - step, target], so the target is what is too much and one step more, less one.
    """
    what = f"--params {limit.said}"
    _check_reach(sizer, limit.parameters, lambda trial: trial.parameters, what, "parameters")
    excess, step = sizer.whole.parameters - limit.parameters, sizer.smallest_step()
    asked: dict[str, Any] = {"params": limit.said, "parameters": limit.parameters}
    while True:
        target = min(excess + step - 1, sizer.top)
        if sizer.looks:
            return Sized(recipe=sizer.recipe_at(target), asked=asked)
        trial = sizer.at(target)
        if trial.job.step <= step or target == sizer.top:
            break
        step = trial.job.step
    asked |= {"step": trial.job.step, "sparsity": trial.recipe.sparsity}
    note = (
        f"{what} is sparsity {trial.recipe.sparsity:.6g}: {trial.parameters:,} parameters planned, "
        f"{limit.parameters:,} allowed, one step is {trial.job.step:,}"
    )
    decided = Decided(counts=trial.counts) if sizer.outlook is not None else None
    return Sized(recipe=trial.recipe, decided=decided, asked=asked, notes=[note])


def _bytes(limit: Fit, source: Source, recipe: Recipe, outlook: Outlook | None) -> Sized:
    """The least sparsity whose weights, vocabulary and cache fit, by bisection."""
    what, notes = f"--fit {limit.said}", []
    if not recipe.multiple_of and step_of(limit.format) > 1:
        step = step_of(limit.format)
        usual = default_multiple(recipe.targets, sum(p.numel() for p in skeleton(source).parameters()))
        recipe = replace(recipe, multiple_of=math.lcm(usual, step))
        notes = [f"FFN widths are multiples of {recipe.multiple_of}: rows of {limit.format} are in blocks of {step}"]
    sizer = Sizer(source, recipe, outlook)
    weigh = Weighing(limit.format, limit.context, overhead_bytes(source))
    least = _check_reach(sizer, limit.bytes, weigh, what, "bytes")
    asked: dict[str, Any] = {"fit": limit.said, "bytes": limit.bytes, "format": limit.format, "context": limit.context}
    if sizer.looks:
        most = weigh(sizer.whole)
        return Sized(recipe=sizer.recipe_at(sizer.top * (most - limit.bytes) // (most - least)), asked=asked)
    trial = least_trial(sizer, lambda trial: weigh(trial) <= limit.bytes)
    parts = weigh.parts(trial)
    said = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    asked |= {"found": parts, "sparsity": trial.recipe.sparsity}
    note = f"{what} is sparsity {trial.recipe.sparsity:.6g}: {sum(parts.values()):,} of {limit.bytes:,} bytes ({said})"
    demands = recipe.per_block and any(not CRITERIA[recipe.scoring(name).criterion].curve for name in recipe.sites)
    if demands:
        notes.append("every site keeps what was planned, whatever its criterion would remove beyond that")
    return Sized(recipe=trial.recipe, decided=Decided(counts=trial.counts), asked=asked, notes=[note, *notes])


def least_trial(sizer: Sizer, fits: Callable[[Trial], bool]) -> Trial:
    """The plan that removes least among those that fit, by bisection over what plans can differ by.

    Raises:
        BudgetError: the recipe's plans do not reach the narrowest sites.
    """
    unit = math.gcd(*(site.cost for site in sizer.whole.job.sites))
    low, high = 0, sizer.top // unit
    best = sizer.at(high * unit)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            trial = sizer.at(middle * unit)
        except BudgetError:
            trial = None
        if trial is not None and fits(trial):
            best, high = trial, middle
        else:
            low = middle
    return best


class Weighing:
    """Bytes of a planned model: its weights in a format, the cache of a context, and what a file holds besides."""

    def __init__(self, name: str, context: int, overhead: int) -> None:
        self.name, self.context, self.overhead = name, context, overhead

    def __call__(self, trial: Trial) -> int:
        """All of them."""
        return sum(self.parts(trial).values())

    def parts(self, trial: Trial) -> dict[str, int]:
        """Bytes by what they are for."""
        sites, counts = trial.job.everything, trial.counts
        tensors = stored_after(trial.model, sites, counts)
        found = {
            f"weights as {self.name}": stored_bytes(tensors, self.name),
            "vocabulary and header": self.overhead + _HEADER_BYTES * len(tensors),
        }
        if self.context:
            found[f"f16 cache of {self.context:,} tokens"] = cache_bytes_of(sites, counts, self.context)
        return found


def overhead_bytes(source: Source) -> int:
    """Bytes of vocabulary and settings in a GGUF file of the model, written and measured where that can be done."""
    if source.gguf is not None:
        return int(min(tensor.data_offset for tensor in GGUFReader(source.folder / source.gguf).tensors))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "vocabulary.gguf"
            writer = GGUFWriter(path, "llama")
            add_vocabulary(writer, source.folder, int(source.config().get("vocab_size") or 0))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            return path.stat().st_size
    except CheckpointError:
        files = (source.folder / name for name in TOKENIZER_FILES)
        return sum(file.stat().st_size for file in files if file.is_file())


def _check_reach(sizer: Sizer, limit: int, size: Callable[[Trial], int], what: str, unit: str) -> int:
    """The size with the fewest units; raise unless the limit is between that and the whole model's.

    Raises:
        BudgetError: says what is outside units, or that there is nothing to remove.
    """
    whole, most = size(sizer.whole), sizer.most()
    least = size(most)
    if whole <= limit:
        why = f" without {sizer.recipe.hidden:g} of its hidden channels" if sizer.recipe.hidden else ""
        raise BudgetError(
            f"{what}: {sizer.source.name}{why} has {whole:,} {unit}, and {limit:,} are allowed: no unit has to go. "
            "Ask for less."
        )
    if least > limit:
        outside = most.parameters - sum(s.cost * most.counts[s.key] for s in most.job.sites)
        hint = "" if sizer.recipe.hidden else ", or take hidden channels too (--hidden)"
        raise BudgetError(
            f"{what}: {limit:,} {unit} cannot be reached: with the fewest units {least:,} are left, and {outside:,} "
            f"parameters (embeddings, norms) belong to no unit. Ask for at least {least:,} {unit}{hint}."
        )
    return least
