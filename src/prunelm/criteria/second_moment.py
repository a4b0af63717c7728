"""GOA's second moment: how much of the module's output energy passes through a unit."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RecipeError
from ..moments import Moments
from ..placement import exact
from ..sites import Site, bias_of, weight_of
from . import Statistics, criterion

FORMS = ("exact", "gaussian", "identity")
GATED = ("single-norm", "paper")


def _needs(*, form: str = "exact", gated: str = "single-norm") -> set[str]:
    if form not in FORMS:
        raise RecipeError(f"second-moment: form must be one of {', '.join(FORMS)}, got {form!r}")
    if gated not in GATED:
        raise RecipeError(f"second-moment: gated must be one of {', '.join(GATED)}, got {gated!r}")
    return {"exact": {"consumer"}, "gaussian": {"consumer", "producer"}, "identity": set()}[form]


@criterion("second-moment", needs=_needs)
def second_moment(
    site: Site, statistics: Statistics, *, form: str = "exact", gated: str = "single-norm"
) -> Float[Tensor, " unit"]:
    """Output energy of each unit: M_j = ||B_j||^2 E[a_j^2], summed over the unit's channels j.

    B_j is column j of the consumer and a_j its input. `form` says how E[a_j^2] is found:
    - `exact`: measured on calibration tokens, activation function and all;
    - `gaussian`: E[a_j^2] = A_j S A_j^T for a linear path (Eq. 3) and half of it behind ReLU, GELU or SiLU (Eq. 4),
      S = E[x x^T] of the producers' input, with biases: A_j S A_j^T + 2 b_j A_j mu + b_j^2;
    - `identity`: the same with S = I and mu = 0, which needs no data.
    A gated FFN D (U x * act(G x)) gives the product of its two paths: `paper` prints
    [||D_j||^2 U_j S U_j^T] x [1/2 ||D_j||^2 G_j S G_j^T], `single-norm` counts ||D_j||^2 once, as independence of the
    two paths would have it.

    For attention the Gaussian form is the exact one: with x^ the attention-weighted input, A_c E[x^ x^^T] A_c^T is
    E[a_c^2], so no attention-weighted covariance is stored.

    Source: arXiv 2407.19126, Eq. 3, Eq. 4, appendix B.
    Differs: the paper prints ||B_i||^2 in Eq. 3 where column j is meant; a head's score is the sum over its channels
    (not spelled out there).
    """
    _needs(form=form, gated=gated)
    columns = exact(weight_of(site.consumer.layer)).square().sum(0)
    if form == "exact" or (form == "gaussian" and site.value is not None):
        assert statistics.consumer is not None
        return (columns * statistics.consumer.energy)[site.consumer.index].sum(1)
    if site.value is not None:
        layer, rows = site.value
        return (columns[site.consumer.index] * _energy(layer, rows, None)).sum(1)
    paths = [
        _energy(slot.layer, part, statistics.producer if form == "gaussian" else None)
        for slot in site.producers
        for part in slot.parts
    ]
    norm = columns[site.consumer.index]
    score = 0.5 * norm * torch.stack(paths).prod(0)
    if gated == "paper" and len(paths) > 1:
        score = score * norm ** (len(paths) - 1)
    return score.sum(1)


def _energy(layer: torch.nn.Module, rows: Tensor, moments: Moments | None) -> Float[Tensor, "unit width"]:
    """E[(A_j x + b_j)^2] for the rows j of a producer; x has unit covariance and zero mean where moments are None."""
    a = exact(weight_of(layer))[rows]
    bias = bias_of(layer)
    b = a.new_zeros(rows.shape) if bias is None else exact(bias)[rows]
    if moments is None:
        return a.square().sum(-1) + b.square()
    return ((a @ moments.second_moment) * a).sum(-1) + 2 * b * (a @ moments.mean) + b.square()
