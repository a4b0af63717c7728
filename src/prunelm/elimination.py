"""Exact backward elimination for least squares: which unit to remove next, and what that costs.

With W the consumer, S = E[x x^T] + D of its input and P = S^-1: removing the channels g of one unit and refitting the
others changes the fit by tr(W_g (P_gg)^-1 W_g^T). Then W and P are downdated, and the next unit is chosen. Only
M = W^T W and P are carried.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .distributed import shared_rows
from .placement import ROWS

BLOCK = 64


def eliminate(
    weight: Float[Tensor, "out channel"],
    inverse: Float[Tensor, "channel channel"],
    units: Int[Tensor, "unit width"],
    *,
    strata: int = 1,
) -> tuple[Int[Tensor, " unit"], Float[Tensor, " unit"]]:
    """The units in the order of their removal, and the squared error that each removal adds after refitting.

    Args:
        weight: of the consumer.
        inverse: of E[x x^T] of its input, damped so that there is one; it is used up.
        units: channels of each unit.
        strata: units come in this many equal runs, and every run loses one unit before any loses another.

    Source: arXiv 2302.04089 (structured OBS), in the form of arXiv 2407.13331's interpolation; derived.
    """
    weight = weight.to(inverse)
    cross = shared_rows(lambda rows: weight.T[rows] @ weight, inverse)
    if units.shape[1] == 1 and strata == 1:
        order = units[:, 0]
        in_place = len(order) == len(cross) and bool((order.diff() == 1).all())
        cross, inverse = (m if in_place else m[order][:, order] for m in (cross, inverse))
        return _channels(cross, inverse)
    return _groups(cross, inverse, units, strata)


def _channels(
    cross: Float[Tensor, "channel channel"], inverse: Float[Tensor, "channel channel"]
) -> tuple[Int[Tensor, " channel"], Float[Tensor, " channel"]]:
    """Single channels; downdates wait until a block of them can be done as one matrix product."""
    alive = torch.arange(len(cross), device=cross.device)
    order, costs = [], []
    while len(alive):
        removed, price, keep, columns, tails, pivots = _block(cross, inverse, min(BLOCK, len(alive)))
        order.append(alive[removed])
        costs.append(price)
        left = keep.nonzero().flatten()
        alive, columns, tails = alive[left], columns[left], tails[left]
        inverse, cross = _drawn_together(inverse, left), _drawn_together(cross, left)
        inverse.addmm_(columns * pivots, columns.T, alpha=-1)
        cross.addmm_(tails, columns.T, alpha=-1)
        cross.addmm_(columns, tails.T, alpha=-1)
    return torch.cat(order), torch.cat(costs)


def _drawn_together(matrix: Float[Tensor, "channel channel"], left: Int[Tensor, " left"]) -> Float[Tensor, "left left"]:
    """Some rows and columns, in ascending order, moved to the front of the matrix; no second one is made."""
    for start in range(0, len(left), ROWS):
        rows = left[start : start + ROWS]
        matrix[start : start + len(rows), : len(left)] = matrix.index_select(0, rows).index_select(1, left)
    return matrix[: len(left), : len(left)]


def _block(
    cross: Float[Tensor, "channel channel"], inverse: Float[Tensor, "channel channel"], size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The next `size` removals and their pending downdates.

    inverse' = inverse - C diag(p) C^T, cross' = cross - A C^T - C A^T.
    """
    n = len(cross)
    columns, tails, pivots = cross.new_zeros(n, size), cross.new_zeros(n, size), cross.new_zeros(size)
    energy, pivot = cross.diagonal().clone(), inverse.diagonal().clone()
    keep = torch.ones(n, dtype=torch.bool, device=cross.device)
    removed, price = [], []
    for k in range(size):
        cost = torch.where(keep, energy.clamp_min(0) / pivot, torch.inf)
        # The place stays a tensor, so that a GPU is never waited for; both are symmetric, and rows lie together.
        least, at = cost.min(0, keepdim=True)
        c, a = columns[:, :k], tails[:, :k]
        own, other = c.index_select(0, at)[0], a.index_select(0, at)[0]
        h = inverse.index_select(0, at)[0] - c @ (pivots[:k] * own)
        s = cross.index_select(0, at)[0] - a @ own - c @ other
        pivots[k : k + 1] = h.index_select(0, at)
        columns[:, k] = h / pivots[k]
        tails[:, k] = s - columns[:, k] * (s.index_select(0, at) / 2)
        energy -= 2 * tails[:, k] * columns[:, k]
        pivot -= pivots[k] * columns[:, k].square()
        keep.index_fill_(0, at, False)
        removed.append(at)
        price.append(least)
    return torch.cat(removed), torch.cat(price), keep, columns, tails, pivots


def _groups(
    cross: Float[Tensor, "channel channel"],
    inverse: Float[Tensor, "channel channel"],
    units: Int[Tensor, "unit width"],
    strata: int,
) -> tuple[Int[Tensor, " unit"], Float[Tensor, " unit"]]:
    """Units of several channels, such as heads; each removal is one downdate of the width of a unit."""
    stratum = torch.arange(len(units), device=cross.device) // (len(units) // strata)
    alive = list(range(len(units)))
    order, costs = [], []
    open_strata = set(range(strata))
    while alive:
        open_strata = open_strata or set(range(strata))
        choices = [u for u in alive if int(stratum[u]) in open_strata]
        index = units[choices]
        own = inverse[index[:, :, None], index[:, None, :]]
        solved = torch.linalg.inv(own)
        price = (cross[index[:, :, None], index[:, None, :]] * solved).sum((1, 2))
        best = int(price.argmin())
        unit, g = choices[best], index[best]
        columns = inverse[:, g] @ solved[best]
        old, among = cross[:, g], cross[g][:, g]
        cross.addmm_(old, columns.T, alpha=-1).addmm_(columns, old.T, alpha=-1).addmm_(columns @ among, columns.T)
        inverse.addmm_(columns, inverse[g], alpha=-1)
        alive.remove(unit)
        open_strata.discard(int(stratum[unit]))
        order.append(unit)
        costs.append(price[best].clamp_min(0))
    return torch.tensor(order, device=cross.device), torch.stack(costs)
