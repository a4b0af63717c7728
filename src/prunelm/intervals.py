"""How sure a number is: standard errors and bootstrap intervals over windows, paired with the dense model."""

import math
from collections.abc import Sequence
from typing import Any

import torch

DRAWS = 2000
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
    low, high = interval(difference.tolist(), counts, seed=seed)
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else None
    return {"value": math.exp(mean), "low": math.exp(low), "high": math.exp(high), "error": error, "level": LEVEL}


def interval(values: Sequence[float], counts: Sequence[int] | None = None, *, seed: int = 0) -> tuple[float, float]:
    """The bootstrap percentile interval (95 %, 2,000 draws) of a mean of windows, weighted by their tokens."""
    draws = _means(values, counts, seed)
    ends = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def interval_of_difference(
    one: tuple[Sequence[float], Sequence[int]], other: tuple[Sequence[float], Sequence[int]], *, seed: int = 0
) -> tuple[float, float]:
    """The same for mean(one) - mean(other), two sets of windows that are drawn apart."""
    draws = _means(*one, seed) - _means(*other, seed + 1)
    ends = torch.quantile(draws, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64))
    return float(ends[0]), float(ends[1])


def _means(values: Sequence[float], counts: Sequence[int] | None, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    value = torch.tensor(values, dtype=torch.float64)
    weight = torch.tensor(counts, dtype=torch.float64) if counts is not None else torch.ones_like(value)
    drawn = torch.randint(len(value), (DRAWS, len(value)), generator=generator)
    return (value[drawn] * weight[drawn]).sum(1) / weight[drawn].sum(1)
