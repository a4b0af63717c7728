"""How sharply a model's output answers to the output of each consumer, from labels that the model draws itself."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .errors import CalibrationError
from .gradients import differentiable, sequences_of
from .sites import Site, weight_of
from .stream import Batch, prediction, real_rows


def output_fisher(
    model: PreTrainedModel, batches: Iterable[Batch], sites: Sequence[Site], *, seed: int
) -> dict[str, Float[Tensor, "out out"]]:
    """G by site key, with E[divergence of the model's output] ~ 1/2 E[d^T G d] for a small change d of a consumer's.

    G = (tokens / rows) x E[g g^T], g the gradient of -log p(y) with respect to the consumer's output at one token and
    y drawn from the model's own prediction; `rows` are what the divergence is a mean over (tokens, or sequences of a
    classifier). A model without a head is asked for random signs of its last hidden state instead. One backward pass
    for each sequence; the pairs of different tokens are left out.

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
    outputs = {site.key: len(weight_of(site.consumer.layer)) for site in sites}
    found = {key: torch.zeros(n, n, dtype=torch.float64) for key, n in outputs.items()}
    rows = 0
    handles = [site.consumer.layer.register_forward_hook(_adder(found[site.key])) for site in sites]
    # Weights of the first block alone collect gradients: that makes autograd pass all the others' outputs.
    first = min(site.block for site in sites)
    try:
        with differentiable(model, [site.consumer.layer for site in sites if site.block == first]):
            for batch in batches:
                for one in sequences_of(batch):
                    loss, seen = drawn_loss(model, one, generator)
                    torch.autograd.backward(loss)
                    rows += seen
                    model.zero_grad(set_to_none=True)
    finally:
        for handle in handles:
            handle.remove()
    for key, matrix in found.items():
        if not bool(torch.isfinite(matrix).all()):
            raise CalibrationError(f"{key}: its gradient is not finite. Try --dtype float32 or another checkpoint.")
    return {key: matrix / max(rows, 1) for key, matrix in found.items()}


def drawn_loss(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """Sum of -log p(y) over the rows of a batch, with y drawn from p, and how many rows there are.

    For a model that predicts nothing, the sum of its last hidden state with random signs, scaled so that the square
    of a change of it is what the divergence between hidden states is.
    """
    output = real_rows(prediction(model(**batch)), batch.get("attention_mask")).float()
    if predicts(model):
        with torch.no_grad():
            labels = torch.multinomial(output.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(output.device)
        return cross_entropy(output, labels, reduction="sum"), len(output)
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    scale = (2 / output.detach().square().mean(0).sum().clamp_min(1e-30)).sqrt()
    return scale * (signs * output).sum(), len(output)


def predicts(model: PreTrainedModel) -> bool:
    """Whether the model's output are logits."""
    return model.get_output_embeddings() is not None or hasattr(model, "classifier")


def _adder(total: Tensor) -> Any:
    def on_forward(_module: nn.Module, _args: Any, output: Tensor) -> None:
        def on_backward(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2).float()
            total.add_((g.T @ g).to(total))

        if output.requires_grad:
            output.register_hook(on_backward)  # type: ignore[no-untyped-call]

    return on_forward
