"""Coarse and fine gradient importance in one score, weighted unit by unit: AEF and HyWIA."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RecipeError
from ..placement import exact
from ..sites import Site
from . import Statistics, criterion

FINE = ("first", "second", "mixed")
COARSE = ("weights", "gates")
FUSIONS = ("reliability", "attention", "fixed", "searched")


def _needs(
    *, fusion: str = "reliability", fine: str = "first", coarse: str = "weights", alpha: float = 0.5
) -> set[str]:
    for name, value, allowed in (("fusion", fusion, FUSIONS), ("fine", fine, FINE), ("coarse", coarse, COARSE)):
        if value not in allowed:
            raise RecipeError(f"fused: {name} must be one of {', '.join(allowed)}, got {value!r}")
    if not 0 <= alpha <= 1:
        raise RecipeError(f"fused: alpha must be in [0, 1], got {alpha}")
    return {"importance"} | ({"gates"} if coarse == "gates" else set())


@criterion("fused", needs=_needs)
def fused(
    site: Site,
    statistics: Statistics,
    *,
    fusion: str = "reliability",
    fine: str = "first",
    coarse: str = "weights",
    alpha: float = 0.5,
) -> Float[Tensor, " unit"]:
    """S = alpha k + (1 - alpha) f for every unit: k its coarse and f its fine importance, each over the site's mean.

    With g_n the gradient of sequence n's loss, over the coupled matrices of the unit:

    - coarse: k = sum_c |E_n[sum_{w in c} w g_n]|, whole channels, so that weights may cancel; with `gates`,
      |E_n[dL_n/dm]| of a gate m on the unit;
    - fine: f = E_n[sum_w |w g_n|] (`first`), with (w g_n)^2 (`second`) or |w g_n - 1/2 (w g_n)^2| (`mixed`).

    alpha, by `fusion`:

    - `reliability`: v_f / (v_k + v_f), the variances over sequences of what each of the two says in absolute values, so
      that the steadier one weighs more (not the least variance of the sum: signs cancel in k);
    - `attention`: softmax((q . k, q . f) / sqrt(N)) of the unit's N values each, q the mean of both over the site;
    - `fixed`: as given; `searched`: the best of 0, 1/4, 1/2, 3/4, 1 for each kind of site by the loss of the pruned
      model, found before the criterion is asked (see `prunelm.fusion`).

    Source: arXiv 2403.10799 (AEF, HyWIA); the importance forms are those of LLM-Pruner's code.
    Differs: the paper's fusion rule could not be obtained; these three are derived from its description. Absolute
    values are taken sequence by sequence, so that no gradient is kept.
    """
    _needs(fusion=fusion, fine=fine, coarse=coarse, alpha=alpha)
    seen = statistics.importance
    assert seen is not None
    each_fine = {"first": seen.first, "second": seen.second, "mixed": seen.mixed}[fine]
    if coarse == "gates":
        assert statistics.gates is not None
        each_coarse, whole = statistics.gates.abs(), statistics.gates.mean(0).abs()
    else:
        signed = [exact(each) for each in seen.signed.values()]
        each_coarse = torch.stack([each.abs().sum(-1) for each in signed]).sum(0)
        whole = torch.stack([each.mean(0).abs().sum(-1) for each in signed]).sum(0)
    k, f = _over_mean(whole), _over_mean(each_fine.mean(0))
    share = torch.full_like(k, alpha)
    if fusion == "searched":
        raise RecipeError("fused: fusion 'searched' is resolved before scoring; prune with it, or say 'fixed' here")
    if fusion != "fixed":
        rule = {"reliability": _by_reliability, "attention": _by_attention}[fusion]
        share = rule(_over_mean(each_coarse), _over_mean(each_fine))
    return share * k + (1 - share) * f


def _over_mean(values: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
    return values / values.mean().clamp_min(1e-300)


def _by_reliability(k: Float[Tensor, "sample unit"], f: Float[Tensor, "sample unit"]) -> Float[Tensor, " unit"]:
    """v_f / (v_k + v_f); one half where neither varies, as with one sequence."""
    if len(k) < 2:
        return torch.full_like(k[0], 0.5)
    v_k, v_f = k.var(0), f.var(0)
    return torch.where(v_k + v_f > 0, v_f / (v_k + v_f).clamp_min(1e-300), 0.5)


def _by_attention(k: Float[Tensor, "sample unit"], f: Float[Tensor, "sample unit"]) -> Float[Tensor, " unit"]:
    query = ((k + f) / 2).mean(1)
    logits = torch.stack([query @ k, query @ f]) / len(k) ** 0.5
    share: Tensor = logits.softmax(0)[0]
    return share
