"""What every sequence says of every unit: sums of weight times gradient, and the slope of a gate on the unit.

Gradients are reduced to sums as backward passes make them and freed at once, so none outlives its layer.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .errors import CalibrationError
from .gradients import differentiable, gradient_of, sequences_of
from .heap import release_memory
from .losses import Objective
from .placement import exact
from .sites import Site, Slot, bias_of, find_blocks, weight_of
from .stream import forwards_replaced


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Of one site, a row for each sequence n, with g_n the gradient of its loss.

    - `signed`, per matrix: sum_{w in c} w g_n of every channel c of every unit, biases of producers included;
    - `first`: sum_{w in unit} |w g_n| over the coupled matrices;
    - `second`: sum_{w in unit} (w g_n)^2;
    - `mixed`: sum_{w in unit} |w g_n - 1/2 (w g_n)^2|.
    """

    signed: Mapping[str, Float[Tensor, "sample unit _"]]
    first: Float[Tensor, "sample unit"]
    second: Float[Tensor, "sample unit"]
    mixed: Float[Tensor, "sample unit"]


def importances(
    model: PreTrainedModel, sites: Sequence[Site], loss: Objective, *, checkpointed: bool = False
) -> dict[str, Importance]:
    """The importance of every site's units, by site key; one backward pass for each sequence.

    Args:
        model: in eval mode; no gradient is left on it.
        sites: whose units are wanted.
        loss: and its batches.
        checkpointed: compute every block again in the backward pass in place of keeping its activations.

    Raises:
        CalibrationError: a gradient is not finite; names the layer.
    """
    found: dict[str, list[dict[str, Tensor]]] = {slot.path: [] for site in sites for slot in _slots(site)}
    handles = [
        parameter.register_post_accumulate_grad_hook(_reducer(slot, found[slot.path]))  # type: ignore[no-untyped-call]
        for site in sites
        for slot in _slots(site)
        for own in (_producer_bias(slot),)
        for parameter in (slot.layer.weight, *([own] if own is not None else []))
        if isinstance(parameter, nn.Parameter)
    ]
    layers = [slot.layer for site in sites for slot in _slots(site)]
    biases = [bias for site in sites for slot in _slots(site) if (bias := _producer_bias(slot)) is not None]
    try:
        for _ in _passes(model, loss, layers, biases, checkpointed=checkpointed):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {site.key: _gathered(site, found) for site in sites}


def gate_slopes(
    model: PreTrainedModel, sites: Sequence[Site], loss: Objective, *, checkpointed: bool = False
) -> dict[str, Float[Tensor, "sample unit"]]:
    """dL_n/dm of a gate m = 1 on every unit's channels before the consumer, by site key.

    It equals sum w g_n over the unit's columns of the consumer's weight, without any gradient of a weight.

    Source: SNIP (arXiv 1810.02340), with one gate a unit; the identity is checked in the tests.
    """
    weights = {site.key: weight_of(site.consumer.layer) for site in sites}
    gates = {key: torch.ones(w.shape[1], requires_grad=True, device=w.device) for key, w in weights.items()}
    handles = [site.consumer.layer.register_forward_pre_hook(_gated(gates[site.key])) for site in sites]
    rows: dict[str, list[Tensor]] = {key: [] for key in gates}
    try:
        for _ in _passes(model, loss, [], [], checkpointed=checkpointed):
            for key, gate in gates.items():
                assert gate.grad is not None
                rows[key].append(gate.grad.clone())
                gate.grad = None
    finally:
        for handle in handles:
            handle.remove()
    return {site.key: exact(torch.stack(rows[site.key])[:, site.consumer.index].sum(-1)) for site in sites}


def _passes(
    model: PreTrainedModel,
    loss: Objective,
    layers: Sequence[nn.Module],
    biases: Sequence[Tensor],
    *,
    checkpointed: bool,
) -> Iterator[None]:
    """A stop behind the backward pass of every sequence, its memory handed back."""
    with differentiable(model, layers, biases), recomputed(model) if checkpointed else contextlib.nullcontext():
        for batch in loss.batches:
            for one in sequences_of(batch):
                torch.autograd.backward(loss(model, one))
                release_memory()
                yield


@contextlib.contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """While open, backward passes compute every block's activations again in place of keeping them."""
    blocks = find_blocks(model)[1]

    def again(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    with forwards_replaced({block: again(block.forward) for block in blocks}):
        yield


def _slots(site: Site) -> tuple[Slot, ...]:
    return (*site.producers, site.consumer)


def _producer_bias(slot: Slot) -> Tensor | None:
    return bias_of(slot.layer) if slot.axis == "out" else None


def _gated(gate: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, args: (args[0] * gate.to(args[0]), *args[1:])


def _reducer(slot: Slot, rows: list[dict[str, Tensor]]) -> Callable[[Tensor], None]:
    """A hook that turns a layer's gradients into sums over its units, once all are there, and frees them."""

    def reduce(_parameter: Tensor) -> None:
        gradient, bias = gradient_of(slot.layer), _producer_bias(slot)
        if gradient is None or (bias is not None and bias.grad is None):
            return
        products = weight_of(slot.layer).detach().float() * gradient.float()  # float16 would round most of them to 0
        products = products if slot.axis == "out" else products.T
        if bias is not None:
            assert bias.grad is not None
            products = torch.cat([products, (bias.detach().float() * bias.grad.float())[:, None]], dim=1)
            bias.grad = None
        slot.layer.weight.grad = None
        rows.append(_sums(slot, products))

    return reduce


def _sums(slot: Slot, products: Float[Tensor, "channel _"]) -> dict[str, Tensor]:
    squares = products.square()
    of_unit = {"first": products.abs(), "second": squares, "mixed": (products - squares / 2).abs()}
    found = {name: exact(each.sum(1))[slot.index].sum(1) for name, each in of_unit.items()}
    return {**found, "signed": products.sum(1)[slot.index]}


def _gathered(site: Site, found: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> Importance:
    for slot in _slots(site):
        if not all(bool(torch.isfinite(row["signed"]).all()) for row in found[slot.path]):
            raise CalibrationError(
                f"{slot.path}: its gradient is not finite. Try --compute-dtype float32 or another checkpoint."
            )
    summed = {
        name: torch.stack([torch.stack([row[name] for row in found[slot.path]]) for slot in _slots(site)]).sum(0)
        for name in ("first", "second", "mixed")
    }
    signed = {slot.path: torch.stack([row["signed"] for row in found[slot.path]]) for slot in _slots(site)}
    return Importance(signed=signed, **summed)
