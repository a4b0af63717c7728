"""Units exchanged one for one while that lowers the error that is left after refitting: backward elimination cannot.

With S the damped second moment of the consumer's input and W its weight, the matrix

    T = [[S, S W^T], [W S, W S W^T]]

swept over the kept channels holds all that is asked: the pivots -(S_KK)^-1 and the refitted weight of the kept, the
remaining variance and the residual's covariance of the others. Taking a unit in or out is one more sweep.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

LEAST_GAIN = 1e-6
"""An exchange must lower the error by more than this share of the output's energy."""


def exchanged(
    weight: Float[Tensor, "out channel"],
    second: Float[Tensor, "channel channel"],
    units: Int[Tensor, "unit width"],
    kept: Int[Tensor, " kept"],
    *,
    limit: int,
    strata: int = 1,
) -> tuple[Int[Tensor, " kept"], int]:
    """The kept units after at most `limit` exchanges, sorted, and how many were made.

    Each exchange takes in the removed unit that lowers the error most, then takes out the unit of its stratum that
    raises it least, and is undone where that is the same unit or nothing is won. The error never rises.

    Args:
        weight: of the consumer.
        second: E[x x^T] of its input, damped so that it can be inverted.
        units: channels of each unit.
        kept: units to start from.
        limit: exchanges to make at most.
        strata: units come in this many equal runs, of which each keeps as many as it has.

    Source: the local search of arXiv 2403.12983 (OSSCAR), here by sweeps; derived.
    """
    weight, units = weight.to(second), units.to(second.device)
    cross = weight @ second
    table = torch.cat([torch.cat([second, cross.T], 1), torch.cat([cross, cross @ weight.T], 1)])
    output = torch.arange(len(second), len(table), device=second.device)
    inside = torch.zeros(len(units), dtype=torch.bool, device=second.device)
    inside[kept] = True
    table = _swept(table, units[inside].flatten())
    stratum = torch.arange(len(units), device=second.device) // (len(units) // strata)
    least = LEAST_GAIN * float((cross * weight).sum())
    made = 0
    while made < limit and not bool(inside.all()):
        gains = torch.where(inside, -torch.inf, _worth(table, units, output))
        taken = int(gains.argmax())
        trial = _swept(table, units[taken])
        among = inside & (stratum == stratum[taken])
        costs = torch.where(among, _worth(trial, units, output), torch.inf)
        given = int(costs.argmin())
        if not float(gains[taken] - costs[given]) > least:
            break
        table = _swept(trial, units[given], back=True)
        inside[taken], inside[given] = True, False
        made += 1
    return inside.nonzero().flatten().cpu(), made


def _worth(
    table: Float[Tensor, "all all"], units: Int[Tensor, "unit width"], output: Int[Tensor, " out"]
) -> Float[Tensor, " unit"]:
    """What the error falls by if a unit is taken in, or rises by if it is taken out."""
    pivots = table[units[:, :, None], units[:, None, :]]
    links = table[units][:, :, output]
    worth: Tensor = (links * torch.linalg.solve(pivots, links)).sum((1, 2)).abs()
    return worth


def _swept(
    table: Float[Tensor, "all all"], g: Int[Tensor, " pivot"], *, back: bool = False
) -> Float[Tensor, "all all"]:
    """The symmetric table swept over the channels `g`; with `back`, as if it never had been."""
    inverse: Tensor = torch.linalg.inv(table[g][:, g])
    columns = table[:, g] @ inverse
    swept: Tensor = table - columns @ table[g]
    sign = -1.0 if back else 1.0
    swept[:, g] = sign * columns
    swept[g] = sign * columns.T
    swept[g[:, None], g[None, :]] = -inverse
    return swept
