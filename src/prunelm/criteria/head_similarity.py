"""GOA's head similarity: heads that attend alike are redundant and go first."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import RecipeError
from ..similarity import printed_removals, repaired_removals
from ..sites import Site
from . import Statistics, criterion
from .second_moment import FORMS, second_moment

RULES = ("repaired", "printed")


def _needs(*, tau: float = 0.16, rule: str = "repaired", form: str = "exact") -> set[str]:
    if rule not in RULES:
        raise RecipeError(f"head-similarity: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if form not in FORMS:
        raise RecipeError(f"head-similarity: form must be one of {', '.join(FORMS)}, got {form!r}")
    return {"similarity"} | ({"consumer"} if form != "identity" else set())


@criterion("head-similarity", needs=_needs)
def head_similarity(
    site: Site, statistics: Statistics, *, tau: float = 0.16, rule: str = "repaired", form: str = "exact"
) -> Float[Tensor, " unit"]:
    """Similar heads first, then the lowest second moment; the scores are ranks.

    D is the Jensen-Shannon matrix of the heads (nats, 0 to 0.693). `rule = "printed"` is Algorithm 2 as it stands:
    what it lists must go whatever the budget says (where widths may differ between blocks; else it goes first), and is
    marked by negative scores; a KV group is listed when all its heads are. `rule = "repaired"` never removes the twin
    of a removed head, takes the less important of a pair, and only orders: the budget decides how many go.

    Args:
        tau: two heads are alike when D_ij < tau; 0.16 to 0.20 in the paper.
        form: how the second moment that orders the rest is found, see `second-moment`.

    Source: arXiv 2407.19126, Eq. 1 and Algorithm 2.
    Differs: `repaired` in everything said above; per-group form for grouped-query attention (not in the paper).
    """
    importance = second_moment(site, statistics, form=form).cpu()
    assert statistics.similarity is not None
    heads_of = _heads(site, len(statistics.similarity))
    score = torch.empty(site.n_units, dtype=torch.float64)
    score[torch.argsort(importance, stable=True)] = torch.arange(site.n_units, dtype=torch.float64)
    if rule == "printed":
        listed = set(printed_removals(statistics.similarity, tau))
        gone = [unit for unit, heads in enumerate(heads_of) if listed.issuperset(heads)]
        score[gone] -= site.n_units + 1
        return score
    gone, locked = repaired_removals(statistics.similarity, importance, heads_of, tau)
    score += site.n_units
    score[sorted(locked)] += site.n_units
    score[gone] = torch.arange(len(gone), dtype=torch.float64)
    return score


def _heads(site: Site, n_heads: int) -> list[list[int]]:
    """The query heads of each unit."""
    per_unit = n_heads // site.n_units
    return [list(range(u * per_unit, (u + 1) * per_unit)) for u in range(site.n_units)]
