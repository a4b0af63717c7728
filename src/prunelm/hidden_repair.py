"""LIAR for the hidden dimension: every reader solved again for what its dense self gave on the dense input."""

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .heap import release_memory
from .hidden import HiddenAxis, Readers, find_hidden, narrow_hidden_
from .moments import CrossMoments, Moments
from .placement import statistics_device
from .progress import Progress
from .reconstructions import Reconstruction
from .repairing import repaired
from .sites import bias_of, set_weight_, weight_of
from .stream import Batch, BlockStream

Pair = tuple[CrossMoments, Moments]
"""Moments of a reader's narrow input with its dense input, and those of the dense input itself."""


@torch.no_grad()
def narrow_and_repair_hidden_(
    model: PreTrainedModel,
    kept: Int[Tensor, " kept"],
    batches: Sequence[Batch],
    fit: Collection[int],
    held: Collection[int],
    *,
    reconstruction: Reconstruction,
    ridge: float,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Remove hidden channels in place and repair all readers in network order; what each repair did, by path.

    Per reader, with x its input in the dense model and x^ its input behind the narrowed and already repaired prefix:
    argmin over V, v of E||W x + b - V x^ - v||^2, damped towards the kept columns of W (the reconstruction says how).
    So V takes over what the removed channels can be predicted to have given, undoes what the norms' other statistics
    do, and aims at the dense model all the way. Writers only lose rows. Two streams run side by side, and the dense
    model is held beside the narrow one until its blocks have been passed.

    A head that shares its weight with the embeddings is left alone: its repair would change them too.

    Source: arXiv 2407.13331 (the embedding dimension is one of its prunable modules; the equations are derived).
    Differs: targets are those of the dense stream; held-out tokens choose the damping, and between repairs.

    Raises:
        CalibrationError: statistics are not finite, or too few tokens; names the layer.
    """
    dense = copy.deepcopy(model)
    narrow_hidden_(model, kept)
    axis = find_hidden(model)
    before, now = BlockStream(dense, batches), BlockStream(model, batches)
    report: dict[str, dict[str, Any]] = {}
    blocks = len(now.blocks)
    for i in range(blocks):
        progress("repairing readers", i, blocks)
        for readers in (r for r in axis.readers if r.block == i):
            pairs = [_pair(before, now, i, readers.paths[0], chosen) for chosen in (fit, held)]
            old = [before.blocks[i].get_submodule(path) for path in readers.paths]
            _repair_(readers, old, pairs, kept, report, reconstruction, ridge)
            release_memory()
        before.advance(i)
        now.advance(i)
        before.blocks[i].to("meta")
    for readers in _untied(axis):
        pairs = [_pair(before, now, None, readers.paths[0], chosen) for chosen in (fit, held)]
        _repair_(readers, [dense.get_submodule(readers.paths[0])], pairs, kept, report, reconstruction, ridge)
    progress("repairing readers", blocks, blocks)
    return report


def _untied(axis: HiddenAxis) -> list[Readers]:
    """The readers outside the blocks that have a weight of their own."""
    return [readers for readers in axis.readers if readers.block is None and not readers.tied]


def _pair(before: BlockStream, now: BlockStream, i: int | None, path: str, batches: Collection[int]) -> Pair | None:
    """Moments over some batches; None where there are none."""
    found: Pair | None = None
    for b in batches:
        x, y = (s.capture_outside(b, [path])[0] if i is None else s.capture(i, b, [path])[0] for s in (now, before))
        if found is None:
            place = statistics_device(x.device)
            found = CrossMoments(y.shape[1], x.shape[1], device=place), Moments(y.shape[1], device=place)
        found[0].update(y, x)
        found[1].update(y)
    if found is not None:
        where = path if i is None else f"block {i}, {path}"
        found[0].x.check(where)
        found[1].check(where)
    return found


def _repair_(
    readers: Readers,
    old: Sequence[nn.Module],
    pairs: Sequence[Pair | None],
    kept: Int[Tensor, " kept"],
    report: dict[str, dict[str, Any]],
    reconstruction: Reconstruction,
    ridge: float,
) -> None:
    """Solve layers that share their input, and write them."""
    for path, layer, dense in zip(readers.paths, readers.layers, old, strict=True):
        weight, bias = weight_of(layer), bias_of(layer)
        outputs = kept if len(weight) < len(weight_of(dense)) else None
        fit, held = (None if pair is None else _aimed(pair, dense, outputs) for pair in pairs)
        assert fit is not None
        everything = torch.arange(weight.shape[1])
        found = repaired(reconstruction, weight, bias, fit, held, everything, ridge=ridge)
        judge = fit if held is None else held
        name = path if readers.block is None else f"{readers.block}.{path}"
        unrepaired = judge.residual(weight, bias)
        report[name] = {"error_before": unrepaired, "error": found.error, "repair": found.how, "ridge": found.ridge}
        set_weight_(layer, found.weight, found.bias)


def _aimed(pair: Pair, dense: nn.Module, outputs: Int[Tensor, " kept"] | None) -> CrossMoments:
    """Moments of the narrow input with what the dense layer makes of the dense input; `outputs` of it, where not all.

    A reader that writes hidden channels as well has lost some of its outputs.
    """
    weight, bias = weight_of(dense), bias_of(dense)
    if outputs is not None:
        weight, bias = weight[outputs], None if bias is None else bias[outputs]
    found = pair[0].mapped(weight, bias)
    found.y_square = CrossMoments.of_layer(pair[1], weight, bias).y_square
    return found
