"""Programs that must open the result: which widths they accept, asked before anything is pruned.

What they read of each family is data of that family (`readers`); what stock `transformers` accepts is asked of itself.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from transformers import PreTrainedConfig, PreTrainedModel

from .errors import BudgetError, RecipeError, UnsupportedModelError
from .sites import Reader, Site, architecture_of
from .stock import stock_config

SMALL = 1_000_000_000
"""Parameters from which on a model is large."""
MULTIPLES = {"transformers": (16, 128), "vllm": (64, 128), "llama.cpp": (32, 256)}
"""Per program, what FFN widths are a multiple of in small and in large models, for its kernels and its quantizers."""
ANY = "any"
NAMES = (*MULTIPLES, ANY)


def readers_of(targets: Collection[str]) -> tuple[str, ...]:
    """The programs beside transformers that are meant."""
    named = MULTIPLES if ANY in targets else targets
    return tuple(name for name in MULTIPLES if name in named and name != "transformers")


def default_multiple(targets: Collection[str], parameters: int) -> int:
    """What FFN widths are a multiple of where the user says nothing: of what every target likes."""
    named = MULTIPLES if ANY in targets else targets
    return math.lcm(*(MULTIPLES[name][parameters >= SMALL] for name in named))


def check_targets(config: PreTrainedConfig, targets: Collection[str], *, uneven: bool) -> None:
    """Raise if a target cannot open the family at all, or not with widths that differ between blocks.

    Raises:
        UnsupportedModelError: the family; names the target.
        RecipeError: the widths; says what would do.
    """
    if uneven and ANY in targets:
        raise RecipeError(
            "widths that differ between blocks do not open everywhere: leave --per-block out or say --uniform, or name "
            f"the programs, as in --for {','.join(MULTIPLES)}"
        )
    for name in readers_of(targets):
        reader = reader_for(config, name)
        if not reader.sites:
            raise UnsupportedModelError(
                f"{name} takes the widths of {config.model_type} from its hidden size, so no pruned one opens there. "
                f"Leave {name} out of --for."
            )
        when = reader.uneven_when
        wrong = {} if when is None else {k: v for k, v in when.items() if getattr(config, k, None) != v}
        if uneven and (when is None or wrong):
            only = f" with {' and '.join(f'{k}={v}' for k, v in wrong.items())}" if wrong else ""
            family = f"{config.model_type} models{only}" if when else f"no {config.model_type} models"
            raise RecipeError(
                f"{name} opens {'only ' if wrong else ''}{family} whose blocks differ in width: leave --per-block out "
                f"or say --uniform, or leave {name} out of --for"
            )


def reader_for(config: PreTrainedConfig, name: str) -> Reader:
    """What a program reads of a model's family.

    Raises:
        UnsupportedModelError: it is not known to open the family.
    """
    readers = architecture_of(config).readers
    if name not in readers:
        known = ", ".join(["transformers", *readers])
        raise UnsupportedModelError(f"{config.model_type} is not known to open in {name}, only in {known}: see --for.")
    return readers[name]


def unread_sites(config: PreTrainedConfig, readers: Collection[str]) -> dict[str, str]:
    """The kinds of site whose widths some program takes from elsewhere than the config, with that program."""
    return _lacking(config, readers, lambda reader: reader.sites)


def unbiased_sites(config: PreTrainedConfig, readers: Collection[str]) -> dict[str, str]:
    """The kinds of site for whose biases some program has no room, with that program."""
    return _lacking(config, readers, lambda reader: reader.biases)


def _lacking(
    config: PreTrainedConfig, readers: Collection[str], has: Callable[[Reader], Collection[str]]
) -> dict[str, str]:
    """The kinds of site that are not among what some program has, with that program."""
    found: dict[str, str] = {}
    for name in readers:
        own = has(reader_for(config, name))
        found |= {spec.name: name for spec in architecture_of(config).sites if spec.name not in own}
    return found


def accepted_widths(
    model: PreTrainedModel, targets: Collection[str], parallel: int, *, uneven: bool
) -> Callable[[Site, int], bool]:
    """Whether every target opens a model that keeps this many units of a site.

    Args:
        model: dense; only its sizes are read.
        targets: programs.
        parallel: devices over which tensor parallelism divides heads and channels.
        uneven: blocks may differ; otherwise all keep the same number, and a stock config must say it.
    """
    readers = readers_of(targets)
    fits = _runs(model, readers) if uneven else _stock(model, readers)

    def accepted(site: Site, kept: int) -> bool:
        return divides(site, kept, parallel) and (kept == site.n_units or fits(site, kept))

    return accepted


def divides(site: Site, kept: int, parallel: int) -> bool:
    """Whether so many devices get equal shares: query heads and channels alike, KV heads alike or one each."""
    sizes = site.measures(kept)
    if site.spec.probabilities is None:
        return kept % parallel == 0
    heads = sizes["kv_heads"]
    return sizes["queries"] % parallel == 0 and (heads % parallel == 0 or (heads > 0 and parallel % heads == 0))


def _stock(model: PreTrainedModel, readers: Collection[str]) -> Callable[[Site, int], bool]:
    """Whether a stock config can say that every block keeps this many units of a site; asked of transformers once."""
    known: dict[tuple[str, int], bool] = {}

    def fits(site: Site, kept: int) -> bool:
        if not kept:
            return False
        key = (site.name, kept if site.spec.probabilities is not None else 0)
        if key not in known:
            known[key] = stock_config(model.config, site.config_values(kept), readers) is not None
        return known[key]

    return fits


def _runs(model: PreTrainedModel, readers: Collection[str]) -> Callable[[Site, int], bool]:
    """Whether a model whose blocks may differ still generates with this many kept units of a site.

    Its cache is asked how long it is at the first attention of each type, which must therefore stay. Other programs
    have no code for sublayers without units.
    """
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    anchors = {kinds.index(kind) for kind in set(kinds)} if model.can_generate() else set()

    def fits(site: Site, kept: int) -> bool:
        attends = site.spec.probabilities is not None
        return kept > 0 or (not readers and not (attends and site.block in anchors))

    return fits


def spoken(targets: Collection[str], parallel: int) -> str:
    """The targets in words."""
    return " and ".join(targets) + (f" on {parallel} devices" if parallel > 1 else "")


def check_held(
    sites: Sequence[Site], kept: Callable[[Site], int], accepted: Callable[[Site, int], bool], who: str
) -> None:
    """Raise if a plan has widths that are not accepted.

    Args:
        sites: of the plan.
        kept: how many units of each stay.
        accepted: see `accepted_widths`.
        who: does not accept them.

    Raises:
        BudgetError: names every block with its width, and the nearest widths that would do.
    """
    wrong = [site for site in sites if not accepted(site, kept(site))]
    if not wrong:
        return
    said = []
    for (name, width), group in groupby(sorted(wrong, key=_order(kept)), key=lambda s: (s.name, kept(s))):
        same = list(group)
        near = sorted((k for k in range(same[0].n_units + 1) if accepted(same[0], k)), key=lambda k: abs(k - width))
        instead = f" (nearest that would do: {', '.join(map(str, sorted(near[:2])))})" if near else ""
        said.append(f"{name} of {blocks_in_words([s.block for s in same])} keeps {width}{instead}")
    raise BudgetError(f"{who} cannot hold this plan: {'; '.join(said)}")


def _order(kept: Callable[[Site], int]) -> Callable[[Site], tuple[str, int, int]]:
    return lambda site: (site.name, kept(site), site.block)


def blocks_in_words(numbers: Sequence[int]) -> str:
    """Block numbers, runs of them shortened."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in runs)
    return f"block{'' if len(numbers) == 1 else 's'} {text}"
