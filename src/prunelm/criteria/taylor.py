"""Taylor criteria of LLM-Pruner: how much the loss changes, to first or second order, when a unit goes."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RecipeError
from ..placement import exact, statistics_device
from ..sites import Site, weight_of
from . import Statistics, criterion

FORMS = ("vector", "first", "second", "mixed")


def _needs(*, form: str = "first") -> set[str]:
    if form not in FORMS:
        raise RecipeError(f"taylor: form must be one of {', '.join(FORMS)}, got {form!r}")
    return {"gradients"}


@criterion("taylor", needs=_needs)
def taylor(site: Site, statistics: Statistics, *, form: str = "first") -> Float[Tensor, " unit"]:
    """Change of the loss with the unit: summed over its channels c in every coupled matrix, g the loss's gradient.

    - `vector` (coarse): |sum_{w in c} w g|, so changes within a channel may cancel;
    - `first` (element-wise): sum_{w in c} |w g|;
    - `second`: sum_{w in c} w^2 F, F = E[g^2] over sequences, the diagonal Fisher information;
    - `mixed`: sum_{w in c} |w g - 1/2 w^2 F|.

    Always `vector` <= `first`. Gradients are those of the recipe's loss at the dense model, one backward pass a
    sequence.

    Source: LLM-Pruner (arXiv 2305.11627), as in its code: vectorize, param_first, param_second, param_mix.
    Differs: whole heads are summed over all their channels in every coupled matrix; calibration is any text.
    """
    _needs(form=form)
    assert statistics.gradients is not None
    total = torch.zeros(
        site.n_units, dtype=torch.float64, device=statistics_device(weight_of(site.consumer.layer).device)
    )
    for slot in (*site.producers, site.consumer):
        gradient = statistics.gradients[slot.path]
        weight = exact(weight_of(slot.layer).detach())
        first, second = weight * exact(gradient.mean), weight.square() * exact(gradient.square)
        change = {"first": first.abs(), "second": second, "mixed": (first - second / 2).abs()}.get(form, first)
        along = change.sum(1 if slot.axis == "out" else 0)
        total += along.abs()[slot.index].sum(1)
    return total
