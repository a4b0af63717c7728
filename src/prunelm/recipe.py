"""Recipes: every choice that changes the numbers, as data. TOML in, JSON in `pruning.json`."""

import dataclasses
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from .allocators import ALLOCATORS
from .criteria import CRITERIA
from .errors import RecipeError
from .hidden_scores import CRITERIA as HIDDEN_CRITERIA
from .losses import LOSSES
from .plan import check_sparsity
from .policy import Policy
from .reconstructions import RECONSTRUCTIONS
from .registry import did_you_mean
from .targets import NAMES

KINDS = ("attention", "ffn")
"""Kinds of site, as `sites` names them."""
CANDIDATES, HELD_OUT = 8, 0.125
"""Plans with equal widths that are measured, and what is held out for it, where a recipe is evened."""
LEAST = {
    "samples": 1,
    "length": 8,
    "min_units": 0,
    "tensor_parallel": 1,
    "price_tokens": 1,
    "fisher_tokens": 1,
    "candidates": 1,
    "rounds": 0,
    "exchanges": 0,
    "natural_steps": 0,
    "multiple_of": 0,
    "similarity_sequences": 1,
    "similarity_rows": 0,
    "similarity_skip": 0,
}
"""What whole numbers are at least."""
SEEDS = 2**32
"""Seeds are below this: what is drawn from them, step by step, has seeds of 64 bits."""
MOST = 2**63 - 1
"""The largest whole number that TOML knows."""
CHOICES = {
    "of": ("blocks", "model"),
    "unit": ("group", "query"),
    "order": ("sequential", "one-shot"),
    "calibration": ("text", "self-generated"),
    "covariance_text": ("same", "random-tokens"),
    "loss": LOSSES,
    "hidden_criterion": HIDDEN_CRITERIA,
}
"""Words that a field may be."""
RECIPES = resources.files("prunelm") / "recipes"


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """A criterion and its options, for one kind of site."""

    criterion: str = "second-moment"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a pruned model besides the model and the text.

    Attributes:
        name: what it is called in reports.
        sparsity: share of parameters to remove, of what `of` says.
        of: `blocks` (parameters of prunable units) or `model` (all parameters, embeddings included).
        allocator: how the budget is divided over the sites.
        per_block: whether widths may differ between blocks (opens with `trust_remote_code` or `prunelm.load`).
        sites: which kinds of site may lose units.
        unit: what a unit of attention is: a KV `group`, or the same number of `query` heads from every group.
        attention_share: sparsity of attention relative to the overall one; 0 leaves attention alone. For allocators
            that divide by shares (`uniform`, `per-module`); others find out what attention loses.
        blocks: half-open range of blocks that may lose units, as in `4:-2`; `:` is all.
        blocks_from: the range applies to models with at least this many blocks; smaller ones use all.
        multiple_of: kept FFN channels, on each device, are a multiple of this; 0 chooses 16 below 1B parameters and
            128 above for transformers, 64 and 128 for vllm, 32 and 256 for llama.cpp.
        targets: programs that must open the result, of `transformers`, `vllm` and `llama.cpp`, or `any`; widths are
            chosen among those that all of them accept.
        tensor_parallel: devices over which heads and FFN channels must divide evenly.
        min_units: units that every site keeps at least; 0 lets whole sublayers go, which needs `per_block`.
        hidden: share of the hidden channels (the width of the residual stream) to remove before any site loses units;
            what goes with them counts towards `sparsity`, and `multiple_of` holds for the channels that stay.
        hidden_criterion: what ranks hidden channels: `energy` (their part in what readers put out) or `magnitude`
            (their part in the readers' weights).
        attention, ffn: criterion and options for each kind of site.
        order: `sequential` (each site sees the already pruned prefix) or `one-shot` (statistics of the dense model).
        reconstruction: how weights are adjusted: a refit of each dense module before it is scored, or a repair of
            what stays once units are gone.
        ridge: pull towards the present weights, relative to the mean diagonal of the second moment (refits) or to
            each channel's own energy (repairs, where held-out tokens move it by factors of ten).
        exchanges: kept units that a repair may exchange for removed ones in each site, where held-out tokens like it.
        bias: give consumers a bias, for repairs to use, where the family's config can say so (Llama: `attention_bias`,
            `mlp_bias`); layers that have one use it anyway.
        held_out: share of the calibration sequences that judges repairs and takes no part in them; 0 judges nothing.
        dense_share: of a repair's target, what the dense model gives on its own inputs; the rest is what the present
            weights give on the inputs behind the pruned prefix.
        choose_share: try 0, 1/4, 1/2 and 1 for `dense_share` in every site, and keep what brings the model's output
            nearest to the dense one on held-out tokens.
        price_tokens: held-out tokens on which allocators that look at the output measure it.
        repeated: share of `price_tokens` in sequences that say their first half twice, so that what copies from the
            context has its price; short texts hardly show it.
        fisher_tokens: calibration tokens that Fisher matrices are taken from.
        candidates: plans with equal widths that `split` measures on `price_tokens`; 1 takes the one expected best.
        loss: what gradients are of, and what a policy's masks are measured by: `next-token`, `masked-lm`, `task` (of
            a classifier, on labeled text), `kl` (from the dense model), `drawn` (labels drawn by the model), or `auto`.
        gradient_checkpointing: compute activations again in backward passes in place of keeping them, for `fused` and
            `snip`.
        policy: a search over keep probabilities in place of the allocator's budgets and the criterion's order.
        rounds: plans that a descent measures on `price_tokens` to refine widths that differ between blocks; 0 takes
            the allocator's plan as it is.
        natural_steps: steps of natural gradient on the divergence of the model's output, once all units are gone: up to
            so many, each as long as held-out tokens like it. They move the consumers of all sites, whatever `sites` and
            `blocks` say.
        samples, length: calibration sequences and tokens in each.
        calibration: `text` (a file that the user names) or `self-generated` (written by the model itself).
        covariance_text: what covariances are taken from, for the Gaussian second moment and for refits: `same` as
            everything else, or `random-tokens` (uniform random token ids).
        similarity_sequences, similarity_rows, similarity_skip: calibration sequences, query rows of each, and first
            rows left out, for the head similarity; `similarity_rows = 0` takes all.
        exclude_sink: leave the first key out of the head similarity.
        seed: for everything random.
    """

    name: str = "custom"
    sparsity: float = 0.2
    of: str = "blocks"
    allocator: str = "uniform"
    per_block: bool = False
    sites: tuple[str, ...] = KINDS
    unit: str = "group"
    attention_share: float = 1.0
    blocks: str = ":"
    blocks_from: int = 0
    multiple_of: int = 0
    targets: tuple[str, ...] = ("transformers",)
    tensor_parallel: int = 1
    min_units: int = 1
    hidden: float = 0.0
    hidden_criterion: str = "energy"
    attention: Scoring = Scoring()
    ffn: Scoring = Scoring()
    order: str = "sequential"
    reconstruction: str = "none"
    ridge: float = 0.01
    exchanges: int = 0
    bias: bool = False
    held_out: float = 0.0
    dense_share: float = 0.0
    choose_share: bool = False
    price_tokens: int = 2048
    repeated: float = 0.0
    fisher_tokens: int = 16_384
    candidates: int = 1
    rounds: int = 0
    loss: str = "auto"
    gradient_checkpointing: bool = False
    policy: Policy | None = None
    natural_steps: int = 0
    samples: int = 64
    length: int = 512
    calibration: str = "text"
    covariance_text: str = "same"
    similarity_sequences: int = 16
    similarity_rows: int = 64
    similarity_skip: int = 8
    exclude_sink: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        check_sparsity(self.sparsity)
        for name, allowed in CHOICES.items():
            _one_of(self, name, allowed)
        _check_numbers(self)
        _check_lists(self)
        _check_allocator(self)
        _check_repair(self)
        if self.policy is not None:
            _check_policy(self, self.policy)
        for scoring in (self.attention, self.ffn):
            _check_options(scoring)
        self.block_range(1)

    def evened(self, sites: tuple[str, ...] = KINDS) -> "Recipe":
        """The recipe with the same widths in every block: where its allocator gives others, `split` chooses them.

        Args:
            sites: what `split` divides the budget over; both kinds by default, as one alone leaves nothing to divide.
        """
        if ALLOCATORS[self.allocator].even:
            return dataclasses.replace(self, per_block=False)
        held_out = self.held_out or HELD_OUT
        even = {"allocator": "split", "rounds": 0, "candidates": CANDIDATES, "per_block": False, "held_out": held_out}
        return dataclasses.replace(self, sites=sites, **even)  # type: ignore[arg-type]

    @property
    def judges_plans(self) -> bool:
        """Whether plans are judged by the divergence of the model's output on held-out tokens."""
        chosen = ALLOCATORS[self.allocator]
        tries = chosen.even and chosen.needs is not None and self.candidates > 1
        return chosen.needs == "damage" or tries or self.rounds > 0

    @property
    def searches(self) -> bool:
        """Whether whole plans are tried, or masks: what a journal keeps."""
        chosen = ALLOCATORS[self.allocator]
        return self.rounds > 0 or self.policy is not None or (chosen.even and self.judges_plans)

    @property
    def prices_output(self) -> bool:
        """Whether plans or targets of repairs are judged by that divergence."""
        return self.judges_plans or self.choose_share

    @property
    def judges_output(self) -> bool:
        """Whether that divergence is measured for anything."""
        return self.prices_output or self.policy is not None or self.natural_steps > 0

    @property
    def searches_widths(self) -> bool:
        """Whether a policy, not the allocator, decides how many units stay where."""
        return self.policy is not None and self.policy.pool != "block"

    @property
    def decides_by_looking(self) -> bool:
        """Whether only a look at the dense model decides how many units stay where."""
        return ALLOCATORS[self.allocator].needs is not None or self.searches_widths

    @property
    def drops_blocks(self) -> bool:
        """Whether whole blocks go, and nothing else."""
        return self.policy is not None and self.policy.layers == "block"

    @property
    def reads_fisher(self) -> bool:
        """Whether the allocator reads Fisher matrices of the dense model; criteria may besides."""
        return ALLOCATORS[self.allocator].needs == "curvature"

    @property
    def reads_text(self) -> bool:
        """Whether any part of the recipe looks at activations."""
        scorings = [self.scoring(name) for name in self.sites]
        if self.judges_output or self.reads_fisher or (self.hidden and self.hidden_criterion == "energy"):
            return True
        return self.reconstruction != "none" or any(CRITERIA[s.criterion].needs(**s.options) for s in scorings)

    @property
    def reads_pruned(self) -> bool:
        """Whether text is read again once it is known which units go: by repairs, refits, steps of natural gradient."""
        return self.reconstruction != "none" or self.natural_steps > 0

    def block_range(self, n_blocks: int) -> range:
        """The blocks that may lose units, of a model with `n_blocks`."""
        start, colon, stop = self.blocks.partition(":")
        try:
            chosen = slice(int(start) if start.strip() else None, int(stop) if stop.strip() else None)
        except ValueError:
            colon = ""
        if not colon:
            raise RecipeError(f"blocks must be a range like '4:-2' or ':', got {self.blocks!r}")
        return range(n_blocks)[chosen] if n_blocks >= self.blocks_from else range(n_blocks)

    def scoring(self, site_name: str) -> Scoring:
        """The criterion and options for a kind of site."""
        return self.attention if site_name == "attention" else self.ffn

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON-able data; `from_dict` reads it back."""
        data = dataclasses.asdict(self)
        for kind in KINDS:
            data[kind] = {"criterion": data[kind]["criterion"], **data[kind]["options"]}
        return {**data, "sites": list(self.sites), "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe", **overrides: Any) -> "Recipe":
        """The recipe that the data says, with some values replaced as by `load`.

        Raises:
            RecipeError: unknown key (with the nearest known one), or a value of the wrong type.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        criterion = overrides.pop("criterion", None)
        values = {**data, **{key: value for key, value in overrides.items() if value is not None}}
        if criterion is not None:
            values |= {kind: {"criterion": criterion} for kind in KINDS}
        for key in values:
            if key not in known:
                raise RecipeError(
                    f"{where}: unknown key {key!r}. {did_you_mean(key, known)}Known: {', '.join(sorted(known))}."
                )
        for kind in KINDS:
            if kind in values:
                values[kind] = _scoring(values[kind], f"{where}: [{kind}]")
        if values.get("policy") is not None and not isinstance(values["policy"], Policy):
            values["policy"] = Policy.from_dict(values["policy"], where)
        for name in ("sites", "targets"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(**values)

    def replaced(self, **overrides: Any) -> "Recipe":
        """The recipe with some values replaced, as by `load`.

        Raises:
            RecipeError: unknown key (with the nearest known one), or a value of the wrong type.
        """
        return self.from_dict(self.to_dict(), f"recipe {self.name!r}", **overrides)

    @classmethod
    def load(cls, name: str | Path, **overrides: Any) -> "Recipe":
        """A recipe by name, or from a TOML file, with some values replaced.

        `criterion=...` replaces the criterion of both kinds of site and clears their options.

        Raises:
            RecipeError: no such recipe (did you mean), no TOML, or a bad value in it.
        """
        return cls.from_dict(_read(name), f"recipe {str(name)!r}", **overrides)


def recipe_names() -> list[str]:
    """The recipes that come with PruneLM."""
    return sorted(entry.name.removesuffix(".toml") for entry in RECIPES.iterdir() if entry.name.endswith(".toml"))


def recipe_summaries() -> list[tuple[str, str, str]]:
    """(name, first line of its comment, origin) of every recipe."""
    lines = [(name, (RECIPES / f"{name}.toml").read_text(encoding="utf-8").split("\n")[0]) for name in recipe_names()]
    return [(name, line.removeprefix("#").strip(), "prunelm") for name, line in lines]


def _read(name: str | Path) -> dict[str, Any]:
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise RecipeError(f"no recipe file {str(path)!r}")
        text, stem = path.read_bytes().decode("utf-8", errors="replace"), path.stem
    else:
        if str(name) not in recipe_names():
            raise RecipeError(
                f"unknown recipe {str(name)!r}. {did_you_mean(str(name), recipe_names())}"
                f"Known: {', '.join(recipe_names())}; or give a .toml file."
            )
        text, stem = (RECIPES / f"{name}.toml").read_text(encoding="utf-8"), str(name)
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path.name}: not valid TOML: {error}") from error
    return {"name": stem, **data}


def _scoring(value: Any, where: str) -> Scoring:
    if isinstance(value, Scoring):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("criterion"), str):
        raise RecipeError(f"{where} must be a table with a criterion, got {json.dumps(value, default=str)}")
    return Scoring(criterion=value["criterion"], options={k: v for k, v in value.items() if k != "criterion"})


def _check_numbers(recipe: Recipe) -> None:
    """Raise unless every number is in its range."""
    if not 0 <= recipe.hidden < 1:
        raise RecipeError(f"hidden must be in [0, 1), got {recipe.hidden}: 0.25 removes a quarter of the channels")
    for name, least in LEAST.items():
        if getattr(recipe, name) < least:
            raise RecipeError(f"{name} must be at least {least}, got {getattr(recipe, name)}")
    if abs(recipe.seed) >= SEEDS:
        raise RecipeError(f"seed must be a whole number below {SEEDS:,}, got {recipe.seed}")
    for name in ("ridge", "attention_share"):
        if not 0 <= getattr(recipe, name) < float("inf"):
            raise RecipeError(f"{name} must be a number from 0 up, got {getattr(recipe, name)}")
    for name, most in (("held_out", 0.5), ("dense_share", 1.0), ("repeated", 1.0)):
        if not 0 <= getattr(recipe, name) <= most:
            raise RecipeError(f"{name} must be in [0, {most:g}], got {getattr(recipe, name)}")


def _check_lists(recipe: Recipe) -> None:
    """Raise unless targets and sites are named, and known."""
    if not recipe.targets or set(recipe.targets) - set(NAMES):
        wrong = next((name for name in recipe.targets if name not in NAMES), "none")
        raise RecipeError(
            f"targets (--for) must be of {', '.join(NAMES)}, got {wrong!r}. {did_you_mean(wrong, NAMES)}".strip()
        )
    if not recipe.sites or set(recipe.sites) - set(KINDS):
        raise RecipeError(f"sites must be attention, ffn or both, got {', '.join(recipe.sites) or 'none'}")


def _check_allocator(recipe: Recipe) -> None:
    """Raise unless the rest of a recipe gives its allocator what that needs."""
    chosen = ALLOCATORS[recipe.allocator]
    if recipe.judges_output and not recipe.held_out:
        prices = recipe.prices_output or recipe.policy is not None
        who = f"allocator {recipe.allocator!r}, rounds, candidates and choose_share" if prices else "natural_steps"
        raise RecipeError(f"{who} measure on held-out tokens: held_out must be above 0, as in 0.125")
    _check_share(recipe)
    if recipe.rounds and (chosen.even or chosen.needs not in ("curves", "damage", "curvature")):
        raise RecipeError(
            f"rounds refine widths that differ between blocks, and allocator {recipe.allocator!r} gives none with "
            "prices: say rounds 0, or use allocator 'fisher', 'sensitivity' or 'error-curve'"
        )
    if chosen.needs is not None and not chosen.even and not recipe.per_block:
        raise RecipeError(
            f"allocator {recipe.allocator!r} gives blocks different widths: it needs per_block (opens with "
            "trust_remote_code or prunelm.load), or use allocator 'split' or 'uniform'"
        )


def _check_share(recipe: Recipe) -> None:
    """Raise if attention is to lose a share of its own where what it loses is found by looking."""
    none_left = recipe.attention_share == 0 and "attention" not in recipe.sites
    if recipe.attention_share == 1 or none_left:
        return
    pooled = recipe.policy is not None and recipe.policy.pool == "all"
    if ALLOCATORS[recipe.allocator].needs is not None or pooled:
        decides = "a policy over all units" if pooled else f"allocator {recipe.allocator!r}"
        raise RecipeError(
            f"attention_share {recipe.attention_share:g} cannot be kept: {decides} finds out what attention loses. "
            "Leave attention alone with --sites ffn, or divide by shares with --allocator uniform (as recipe obs does)"
        )


def _check_repair(recipe: Recipe) -> None:
    """Raise unless what is said of the repair goes with it."""
    stage = RECONSTRUCTIONS[recipe.reconstruction].stage
    if recipe.order == "one-shot" and (stage == "refit" or recipe.dense_share or recipe.choose_share):
        raise RecipeError(
            "order 'one-shot' sees no drift: use another reconstruction than a refit, dense_share 0 and no "
            "choose_share, or order 'sequential'"
        )
    if recipe.choose_share and (stage != "repair" or recipe.dense_share):
        raise RecipeError(
            "choose_share chooses the target of a repair: it needs a reconstruction such as 'least-squares', and "
            f"takes no dense_share, which is {recipe.dense_share}"
        )
    if recipe.exchanges and (stage != "repair" or not recipe.held_out):
        raise RecipeError(
            "exchanges lower the error that a repair leaves, and held-out tokens decide: they need a "
            "reconstruction such as 'least-squares', and held_out above 0"
        )


def _check_policy(recipe: Recipe, policy: Policy) -> None:
    """Raise unless the rest of a recipe leaves its policy what it decides."""
    if not recipe.held_out:
        raise RecipeError("a policy is judged on held-out tokens: held_out must be above 0, as in 0.125")
    if recipe.unit != "group":
        raise RecipeError("a policy keeps or drops KV groups: unit must be 'group'")
    if recipe.loss == "drawn":
        raise RecipeError("loss 'drawn' is for gradients: a policy needs another, such as 'auto' or 'kl'")
    if recipe.rounds or recipe.candidates > 1 or ALLOCATORS[recipe.allocator].needs is not None:
        raise RecipeError("a policy searches by itself: use allocator 'uniform', rounds 0 and candidates 1 with it")
    if policy.pool == "block" and policy.layers != "none":
        raise RecipeError("policy: pool 'block' keeps the same share of every layer, so no whole layer can go")
    if policy.layers == "block" and (recipe.per_block or recipe.reconstruction != "none"):
        raise RecipeError("policy: dropped blocks leave nothing to repair or narrow: no reconstruction, no per_block")
    if policy.layers == "block" and recipe.natural_steps:
        raise RecipeError("policy: dropped blocks leave nothing to repair: natural_steps must be 0")
    if policy.layers == "block" and recipe.hidden:
        raise RecipeError("policy: blocks are dropped from a model with all its hidden channels: hidden must be 0")
    if policy.layers == "sublayer" and recipe.min_units:
        raise RecipeError("policy: a sublayer can only go whole where min_units is 0")
    if policy.pool != "block" and policy.layers != "block" and not recipe.per_block:
        raise RecipeError(
            "a policy gives blocks different widths: it needs per_block (opens with trust_remote_code or "
            "prunelm.load), or pool 'block'"
        )


def _check_options(scoring: Scoring) -> None:
    criterion = CRITERIA[scoring.criterion]
    parameters = inspect.signature(criterion.score).parameters
    known = {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for name, value in scoring.options.items():
        if name not in known:
            options = f"Known: {', '.join(known)}." if known else "It has no options."
            raise RecipeError(
                f"criterion {scoring.criterion!r} has no option {name!r}. {did_you_mean(name, known)}{options}"
            )
        _check_value(f"criterion {scoring.criterion!r}: {name}", value, known[name].annotation)
    criterion.needs(**scoring.options)


def _check_types(recipe: Recipe) -> None:
    hints = typing.get_type_hints(Recipe)
    for f in dataclasses.fields(recipe):
        _check_value(f.name, getattr(recipe, f.name), hints[f.name])


def _check_value(name: str, value: Any, hint: Any) -> None:
    origin = typing.get_origin(hint)
    if origin is tuple:
        good = isinstance(value, tuple) and all(isinstance(item, str) for item in value)
        word = "a list of strings"
    elif isinstance(hint, types.UnionType) or not isinstance(hint, type):
        return
    elif hint is float:
        good, word = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    elif hint is int:
        good, word = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        good, word = (
            isinstance(value, hint),
            {str: "a string", bool: "true or false"}.get(hint, hint.__name__),
        )
    if not good:
        raise RecipeError(f"{name} must be {word}, got {value!r}")
    if isinstance(value, int) and abs(value) > MOST:
        raise RecipeError(f"{name} must be at most {MOST:,}, got a number of {len(str(abs(value)))} digits")


def _one_of(recipe: Recipe, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(recipe, name)
    if value not in allowed:
        raise RecipeError(
            f"{name} must be one of {', '.join(allowed)}, got {value!r}. {did_you_mean(value, allowed)}".strip()
        )
