"""Standard errors and intervals, against what repeated draws show."""

import math
import statistics

import pytest
import torch

from prunelm.intervals import interval, interval_of_difference, ratio_of, weighted_error


def _normal(n: int, seed: int) -> list[float]:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


def test_an_interval_is_as_wide_as_95_percent_say() -> None:
    values = _normal(400, 1)
    low, high = interval(values)
    assert low is not None
    assert high is not None
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)
    assert (high + low) / 2 == pytest.approx(statistics.mean(values), abs=half / 4)
    counts = [1] * len(values)
    low, high = interval_of_difference((values, counts), (_normal(400, 2), counts))
    assert low is not None
    assert high is not None
    assert (high - low) / 2 == pytest.approx(half * math.sqrt(2), rel=0.15)


def test_the_error_of_equal_windows_is_the_usual_one() -> None:
    values = _normal(30, 3)
    usual = statistics.stdev(values) / math.sqrt(len(values))
    assert weighted_error(values, [64] * len(values)) == pytest.approx(usual)
    assert ratio_of(values, [0.0] * len(values), [64] * len(values))["error"] == pytest.approx(usual)
    assert weighted_error([1.0], [64]) is None


def test_the_error_of_unequal_texts_is_what_repeated_draws_show() -> None:
    """Texts of 1 or 40 tokens, whose loss is a mean over as many: the long ones decide the mean, and are surer."""
    means, errors = [], []
    for seed in range(200):
        counts = [40 if n % 2 else 1 for n in range(100)]
        values = [x / math.sqrt(t) for x, t in zip(_normal(100, seed), counts, strict=True)]
        means.append(sum(x * t for x, t in zip(values, counts, strict=True)) / sum(counts))
        errors.append(weighted_error(values, counts))
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)
