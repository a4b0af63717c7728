"""How sharply a model's output answers to the output of each consumer, from labels that the model draws itself."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import CalibrationError
from .gradients import differentiable
from .losses import drawn_loss
from .moments import squares
from .placement import statistics_device
from .sites import Site, weight_of
from .stream import Batch


def output_fisher(
    model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site], *, seed: int
) -> dict[str, Float[Tensor, "out out"]]:
    """G by site key, with E[divergence of the model's output] ~ 1/2 E[d^T G d] for a small change d of a consumer's.

    G = (tokens / rows) x E[g g^T], g the gradient of -log p(y) with respect to the consumer's output at one token and
    y drawn from the model's own prediction; `rows` are what the divergence is a mean over (tokens, or sequences of a
    classifier). A model without a head is asked for random signs of its last hidden state instead. One backward pass
    for each batch; the pairs of different tokens are left out.

    Args:
        model: in eval mode.
        batches: token batches.
        sites: whose consumers are wanted.
        seed: of the labels.

    Raises:
        CalibrationError: a gradient is not finite; names the site.

    Source: arXiv 1503.05671 (Kronecker factors of the Fisher matrix); the use is ours.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in sites:
        weight = weight_of(site.consumer.layer)
        place = statistics_device(weight.device)
        found[site.key] = torch.zeros(len(weight), len(weight), dtype=torch.float64, device=place)
    rows = 0
    handles = [site.consumer.layer.register_forward_hook(adder(found[site.key])) for site in sites]
    # Weights of the first block alone collect gradients: that makes autograd pass all the others' outputs.
    first = min(site.block for site in sites)
    try:
        with differentiable(model, [site.consumer.layer for site in sites if site.block == first]):
            for batch in batches:
                loss, seen = drawn_loss(model, batch, generator)
                torch.autograd.backward(loss)
                rows += seen
                model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    for key, matrix in found.items():
        finite(key, matrix)
    return {key: matrix / max(rows, 1) for key, matrix in found.items()}


def finite(key: str, matrix: Tensor) -> None:
    """Raise unless a site's matrix is finite.

    Raises:
        CalibrationError: names the site.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise CalibrationError(f"{key}: its gradient is not finite. Try --compute-dtype float32 or another checkpoint.")


def adder(total: Tensor) -> Any:
    """A hook on a layer that adds g g^T over tokens to `total`, g the gradient of the layer's output."""

    def on_forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
        def on_backward(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2)
            total.add_(squares(g).to(total))

        if output.requires_grad:
            output.register_hook(on_backward)  # type: ignore[no-untyped-call]

    return on_forward
