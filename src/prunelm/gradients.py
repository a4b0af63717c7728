"""Gradients of the loss with respect to the weights that sites may lose: mean, and mean square over sequences."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import CalibrationError
from .losses import next_token_loss
from .sites import Site, weight_of
from .stream import Batch

Loss = Callable[[PreTrainedModel, Batch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """Of one layer's weight, in its (out, in) form: E[g] and E[g^2] over sequences."""

    mean: Float[Tensor, "out into"]
    square: Float[Tensor, "out into"]


@contextlib.contextmanager
def differentiable(
    model: PreTrainedModel, layers: Iterable[nn.Module], biases: Iterable[Tensor] = ()
) -> Iterator[None]:
    """While open, the weights of these layers, and these biases, alone collect gradients; nothing is left of them."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    wanted = [*(layer.weight for layer in layers), *biases]
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in wanted:
            assert isinstance(parameter, nn.Parameter)
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.grad = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


def sequences_of(batch: Batch) -> Iterator[Batch]:
    """The sequences of a batch, each a batch of its own."""
    for row in range(len(batch["input_ids"])):
        yield {name: value[row : row + 1] for name, value in batch.items()}


def gradient_of(layer: nn.Module) -> Float[Tensor, "out into"] | None:
    """The gradient that a layer's weight has collected, in its (out, in) form."""
    found = layer.weight.grad
    if not isinstance(found, Tensor):
        return None
    return found.T if isinstance(layer, Conv1D) else found


def collect(
    model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site], loss: Loss = next_token_loss
) -> dict[str, Gradient]:
    """The gradient of every layer of the sites, by the layer's path.

    One backward pass for each sequence; what it leaves is added up and freed at once, so the peak is the model, two
    sums of the size of the sites' weights, and one backward pass.

    Args:
        model: in eval mode; its own gradients are left as they were: none.
        batches: token batches.
        sites: whose producers and consumers are wanted.
        loss: what is differentiated.

    Raises:
        CalibrationError: a gradient is not finite; names the layer.
        UnsupportedModelError: the model has no such loss.
    """
    layers = {slot.path: slot.layer for site in sites for slot in (*site.producers, site.consumer)}
    sums = {path: torch.zeros_like(weight_of(layer), dtype=torch.float32) for path, layer in layers.items()}
    squares = {path: torch.zeros_like(weight_of(layer), dtype=torch.float32) for path, layer in layers.items()}
    count = 0
    with differentiable(model, layers.values()):
        for batch in batches:
            for one in sequences_of(batch):
                torch.autograd.backward(loss(model, one))
                count += 1
                for path, layer in layers.items():
                    found = gradient_of(layer)
                    if found is not None:
                        sums[path] += found
                        squares[path] += found.float().square()
                    layer.weight.grad = None
    return {path: _checked(path, sums[path] / max(count, 1), squares[path] / max(count, 1)) for path in layers}


def _checked(path: str, mean: Tensor, square: Tensor) -> Gradient:
    if not bool(torch.isfinite(square).all()):
        raise CalibrationError(
            f"{path}: its gradient is not finite. Try --compute-dtype float32 or another checkpoint."
        )
    return Gradient(mean=mean.detach(), square=square.detach())
