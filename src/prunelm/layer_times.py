"""How long a block takes at several widths on this machine, by shapes alone; kept in a file of the user's cache."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.constants import HF_HOME
from torch import nn
from transformers import PreTrainedModel

from .depth import drop_blocks_
from .differing import digest_of
from .errors import OutputError
from .limits import Speedup
from .loading import Source, skeleton, stored_dtype
from .placement import device_words
from .plan import Budget, Counts
from .progress import Progress
from .sites import Site, find_blocks, find_sites, narrow_
from .speed import decode_seconds, prefill_seconds
from .writing import write_whole

M = TypeVar("M", bound=nn.Module)
FORMAT = 1
BLOCKS = 2
"""Blocks of a model whose widths are timed."""
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0)
"""Widths that are timed, as shares of the units between the fewest and all."""
ROUNDS, NEW_TOKENS = 7, 16
SPREAD = 0.02
"""Standard deviation of the weights of models of which only the time matters."""

Times = dict[str, list[tuple[int, float]]]
"""Per kind of site: (units kept, seconds that a block takes less than a whole one), most units first."""


def stand_in(source: Source, counts: Counts, unit: str, blocks: int | None = None) -> PreTrainedModel:
    """A model of the given widths with arbitrary weights, on the device and in the dtype that a user would run it in.

    Args:
        source: the dense model; only its shapes are read.
        counts: units that stay, by site key; others stay whole.
        unit: of attention.
        blocks: so many of its first blocks; all by default.
    """
    return _filled(_shapes(source, counts, unit, blocks), source).eval()


def _shapes(source: Source, counts: Counts, unit: str, blocks: int | None) -> PreTrainedModel:
    """The model of the given widths, without weights."""
    model = skeleton(source)
    whole = len(find_blocks(model)[1])
    if blocks is not None and blocks < whole:
        drop_blocks_(model, list(range(blocks, whole)))
    for key in [site.key for site in find_sites(model, unit)]:
        site = next(s for s in find_sites(model, unit) if s.key == key)
        if counts.get(key, site.n_units) < site.n_units:
            narrow_(site, _first(site, counts[key]))
    return model


def _filled(module: M, source: Source) -> M:
    """A module without weights, with some on the device and in the dtype that a user would run the model in."""
    device = source.device
    module = module.to_empty(device=device).to(_dtype(source))
    generator = torch.Generator(device=device).manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, SPREAD, generator=generator)
        for buffer in module.buffers():
            buffer.fill_(1)
    return module


def _dtype(source: Source) -> torch.dtype:
    """What a user would run the model in."""
    return torch.float32 if source.device.type == "cpu" else stored_dtype(source)


def _first(site: Site, kept: int) -> torch.Tensor:
    """The first units of every stratum."""
    whole = torch.arange(site.n_units, device="cpu").reshape(site.strata, -1)
    return whole[:, : kept // site.strata].flatten()


def run_seconds(model: PreTrainedModel, limit: Speedup) -> float:
    """Seconds of what a limit of speed is of: one prompt, or some tokens one by one."""
    if limit.decode:
        return decode_seconds(model, limit.length, NEW_TOKENS)[1]
    return prefill_seconds(model, limit.length, limit.batch)


def ratio_in_turns(models: Sequence[PreTrainedModel], limit: Speedup, rounds: int) -> float:
    """How many times faster the second model is than the first: the median over rounds in which they take turns."""
    ratios = []
    for turn in range(rounds + 1):
        first, second = (run_seconds(model, limit) for model in models)
        if turn:
            ratios.append(first / second)
    return statistics.median(ratios)


def layer_times(
    source: Source, limit: Speedup, sites: Sequence[Site], budget: Budget, unit: str, progress: Progress
) -> tuple[Times, Path]:
    """What a block saves at several widths of each kind of site, and the file that keeps it.

    Widths take turns, each in a model of two blocks; the first site of a kind stands for all of them.
    """
    first = {site.name: site for site in reversed(sites)}
    asked = {name: _widths(site, budget) for name, site in sorted(first.items())}
    facts = {
        "format": FORMAT,
        "device": device_words(source.device),
        "dtype": str(_dtype(source)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": sorted({str(tuple(p.shape)) for p in skeleton(source).parameters()}),
        "widths": asked,
        "of": [limit.length, limit.batch, limit.decode],
    }
    path = Path(HF_HOME) / "prunelm" / f"layer-times-{digest_of(facts)[:16]}.json"
    known = _read(path, facts)
    if known is None:
        known = _measured(source, limit, asked, unit, progress)
        _keep(path, {"facts": facts, "times": known})
    return known, path


def _widths(site: Site, budget: Budget) -> list[int]:
    """Numbers of kept units to time, most first."""
    options = budget.options(site)
    wanted = [options[round((1 - share) * (len(options) - 1))] for share in SHARES]
    return [site.n_units - removed for removed in dict.fromkeys(wanted)]


def _measured(source: Source, limit: Speedup, asked: Mapping[str, list[int]], unit: str, progress: Progress) -> Times:
    """Seconds saved by one block, per kind of site and width."""
    model = stand_in(source, {}, unit, BLOCKS)
    path, own = find_blocks(model)
    variants = {}
    for name, widths in asked.items():
        for kept in widths:
            counts = {f"{i}.{name}": kept for i in range(len(own))}
            variants[name, kept] = _filled(find_blocks(_shapes(source, counts, unit, BLOCKS))[1], source)
    times: dict[tuple[str, int], list[float]] = {variant: [] for variant in variants}
    parent, _, place = path.rpartition(".")
    for turn in range(ROUNDS + 1):
        progress("timing layers", turn, ROUNDS + 1)
        for variant, blocks in variants.items():
            setattr(model.get_submodule(parent), place, blocks.eval())
            seconds = run_seconds(model, limit)
            if turn:
                times[variant].append(seconds)
    progress("timing layers", ROUNDS + 1, ROUNDS + 1)
    found: Times = {}
    for name, widths in asked.items():
        whole = times[name, widths[0]]
        for kept in widths:
            pairs = zip(whole, times[name, kept], strict=True)
            found.setdefault(name, []).append((kept, statistics.median(a - b for a, b in pairs) / len(own)))
    return found


def saved_seconds(times: Times, site: Site, kept: int) -> float:
    """Seconds that a site saves with so many units left: on straight lines between what was timed, never falling."""
    points = times[site.name]
    saved = 0.0
    for (wide, less), (narrow, more) in pairwise(points):
        less = max(saved, less)
        more = max(less, more)
        if kept >= wide:
            return saved
        if kept >= narrow:
            return less + (more - less) * (wide - kept) / (wide - narrow)
        saved = more
    return saved


def _read(path: Path, facts: Mapping[str, Any]) -> Times | None:
    """The times of a file, if it is of the very same thing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["facts"] != json.loads(json.dumps(facts)):
            return None
        return {name: [(int(k), float(s)) for k, s in points] for name, points in data["times"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _keep(path: Path, data: Mapping[str, Any]) -> None:
    """Write the file; where nothing can be kept, times are measured again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(data, indent=1) + "\n")
    except (OSError, OutputError):
        return
