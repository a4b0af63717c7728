"""How sure a number is: standard errors and bootstrap intervals over windows, paired with the dense model."""

import math
from collections.abc import Sequence
from typing import Any

import torch

DRAWS = 2000
Interval = tuple[float, float] | tuple[None, None]
"""Both ends; none where a single window says nothing of how much windows differ."""
LEVEL = 0.95


def ratio_of(
    losses: Sequence[float], dense: Sequence[float], counts: Sequence[int], *, seed: int = 0
) -> dict[str, Any]:
    """exp(mean loss - mean dense loss): how many times the dense perplexity, with its interval.

    Windows are drawn with replacement, each with both its losses, so that what is hard for both models cancels.
    `error` is the standard error of the logarithm, over windows.
    """
    difference = torch.tensor(losses, dtype=torch.float64) - torch.tensor(dense, dtype=torch.float64)
    weight = torch.tensor(counts, dtype=torch.float64)
    mean = float((difference * weight).sum() / weight.sum())
    low, high = exponents(interval(difference.tolist(), counts, seed=seed))
    error = weighted_error(difference.tolist(), counts)
    return {"value": math.exp(mean), "low": low, "high": high, "error": error, "level": LEVEL}


def weighted_error(values: Sequence[float], counts: Sequence[int]) -> float | None:
    """The standard error of the mean of windows weighted by their tokens; none of a single one.

    error = ( n / (n - 1) x sum_i ( t_i (x_i - mean) )^2 )^(1/2) / sum_i t_i,  which is stdev / n^(1/2) where all t_i
    are equal.

    Source: the linearised variance of a ratio of sums (Cochran, Sampling Techniques, 1977, section 2.11).
    """
    if len(values) < 2:
        return None
    value, weight = (torch.tensor(of, dtype=torch.float64) for of in (values, counts))
    mean = (value * weight).sum() / weight.sum()
    squares = (weight * (value - mean)).square().sum() * len(values) / (len(values) - 1)
    return float(squares.sqrt() / weight.sum())


def interval(values: Sequence[float], counts: Sequence[int] | None = None, *, seed: int = 0) -> Interval:
    """The bootstrap percentile interval (95 %, 2,000 draws) of a mean of windows, weighted by their tokens."""
    if len(values) < 2:
        return None, None
    draws = _means(values, counts, seed)
    ends = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def interval_of_difference(
    one: tuple[Sequence[float], Sequence[int]], other: tuple[Sequence[float], Sequence[int]], *, seed: int = 0
) -> Interval:
    """The same for mean(one) - mean(other), two sets of windows that are drawn apart."""
    if min(len(one[0]), len(other[0])) < 2:
        return None, None
    draws = _means(*one, seed) - _means(*other, seed + 1)
    ends = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def exponents(ends: Interval) -> Interval:
    """Both ends, as exponents of e."""
    low, high = ends
    return (None, None) if low is None or high is None else (math.exp(low), math.exp(high))


def _means(values: Sequence[float], counts: Sequence[int] | None, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.tensor(values, dtype=torch.float64)
    weight = torch.tensor(counts, dtype=torch.float64) if counts is not None else torch.ones_like(value)
    drawn = torch.randint(len(value), (DRAWS, len(value)), generator=generator)
    return (value[drawn] * weight[drawn]).sum(1) / weight[drawn].sum(1)
