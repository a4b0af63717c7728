"""Moments of the layers that a site's criterion and repair read, collected as a stream passes its block."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import nn

from .layer_outputs import LayerOutputs
from .moments import CrossMoments, Moments
from .placement import statistics_device
from .sites import Site, bias_of, weight_of
from .stream import BlockStream

MEASURED = ("consumer", "held", "producer")
"""Statistics that are moments; `gram` asks for the first in full."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Moments of one site: of the consumer's input on tokens to fit and on held-out ones, and of the producers'."""

    consumer: Moments | None = None
    held: Moments | None = None
    producer: Moments | None = None


def observe(
    stream: BlockStream,
    i: int,
    sites: Sequence[Site],
    needs: Mapping[str, Collection[str]],
    batches: Mapping[str, Collection[int]],
    *,
    advance: bool,
    known: LayerOutputs | None = None,
) -> dict[str, Observed]:
    """Moments of some sites of block `i`, in one pass over the batches that anyone needs.

    Args:
        stream: at block `i`.
        i: the block.
        sites: of that block.
        needs: per site name, which of `consumer`, `gram` (the consumer's in full), `held` and `producer`.
        batches: which batches each of `consumer`, `held` and `producer` is measured on.
        advance: carry every batch through the block as well.
        known: of a layer of the block whose outputs are to be given again; they are kept here.

    Raises:
        CalibrationError: statistics are not finite; names the block.
    """
    wanted: dict[tuple[str, str], tuple[str, Moments]] = {}
    for site in sites:
        asked = set(needs[site.name])
        if "gram" in asked:
            asked.add("consumer")
        # In one order on all processes, whose sets are not: they add up their moments one after the other.
        for need in (one for one in MEASURED if one in asked):
            path = first_producer(site) if need == "producer" else site.spec.consumer[0]
            weight = weight_of(site.root.get_submodule(path))
            place = statistics_device(weight.device)
            full = need != "consumer" or "gram" in asked
            wanted[site.key, need] = (path, Moments(weight.shape[1], full=full, device=place, dtype=stream.room.sums))
    for b in range(len(stream.batches)):
        now = [w for (_, need), w in wanted.items() if b in batches[need]]
        if now or advance:
            with known.of(b) if known is not None else nullcontext():
                found = stream.capture(i, b, [path for path, _ in now], advance=advance)
            for (_, moments), a in zip(now, found, strict=True):
                moments.update(a)
    for (key, _), (_, moments) in wanted.items():
        moments.settle()
        moments.share()
        moments.check(f"block {i}, {key}")
    return {
        site.key: Observed(**{need: moments for (key, need), (_, moments) in wanted.items() if key == site.key})
        for site in sites
    }


def observe_pair(
    stream: BlockStream,
    dense: BlockStream,
    i: int,
    path: str,
    batches: Collection[int],
    *,
    original: nn.Module,
    through: nn.Module | None,
    advance: bool,
) -> CrossMoments:
    """Moments of a layer's drifted input with its dense input, or with what `through` makes of the dense input.

    Args:
        stream: hidden states behind the pruned prefix.
        dense: hidden states behind the dense prefix, carried through the block with `advance`.
        i: the block.
        path: of the layer in the block.
        batches: which batches are measured.
        original: the block as it was.
        through: the dense layer whose output is the target; without it the dense input is.
        advance: see `dense`.
    """
    weight = weight_of(stream.blocks[i].get_submodule(path))
    targets = weight_of(original.get_submodule(path)).shape[1] if through is None else len(weight_of(through))
    place = statistics_device(weight.device)
    moments = CrossMoments(targets, weight.shape[1], device=place, dtype=stream.room.sums)
    for b in batches:
        (target,) = dense.capture(i, b, [path], block=original, advance=advance)
        (x,) = stream.capture(i, b, [path])
        if through is not None:
            target = nn.functional.linear(target, weight_of(through), bias_of(through))
        moments.update(target, x)
    moments.settle()
    moments.share()
    return moments


def first_producer(site: Site) -> str:
    """The path of the layer whose input all producers share."""
    return next(iter(site.spec.producers))
