"""What a report draws beside the plan: each site's error curve, what errors cost at the output, how alike heads are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .criteria import CRITERIA
from .recipe import Recipe
from .sensitivity import Point, damage_of
from .sites import Site

FORMAT = 1
FILE = "curves.json"
POINTS = 33
"""Points of a curve that are kept."""


def traced(
    site: Site,
    curve: Float[Tensor, " count"],
    kept: int,
    recipe: Recipe,
    *,
    points: Sequence[Point] = (),
    price: float | None = None,
) -> dict[str, Any]:
    """One site's curve at about 33 numbers of removed units, the chosen one among them, JSON-able.

    `damage` is the divergence to expect at the model's output: through the `points` measured, or by the search's
    `price` of a unit of error; absent where neither was looked at.
    """
    n = site.n_units
    removed = sorted({round(k * n / (POINTS - 1)) for k in range(POINTS)} | {n - kept} | {o for o, _ in points})
    found: dict[str, Any] = {
        "units": n,
        "kept": kept,
        "cost": site.cost,
        "measure": "error" if CRITERIA[recipe.scoring(site.name).criterion].curve else "share of scores",
        "removed": removed,
        "error": _short(curve[removed]),
    }
    if points:
        found["damage"] = _short(damage_of(curve, points, removed))
    elif price is not None:
        found["damage"] = _short(price * curve[removed])
    return found


def upper_triangle(d: Float[Tensor, "head head"]) -> list[float]:
    """The entries right of the diagonal of a symmetric matrix, row by row."""
    rows, columns = torch.triu_indices(len(d), len(d), 1)
    return _short(d[rows, columns])


def curves_data(sites: Mapping[str, Any], similarity: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `curves.json`."""
    return {"format": FORMAT, "sites": dict(sites), "similarity": dict(similarity)}


def _short(values: Tensor) -> list[float]:
    return [float(f"{value:.4g}") for value in values.tolist()]
