import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.errors import CalibrationError
from prunelm.moments import CrossMoments
from prunelm.reconstructions.two_step import two_step as solve


def two_step(weight, bias, moments, *, ridge):
    return solve(weight, bias, moments, torch.arange(weight.shape[1]), ridge=ridge)


def _problem(seed, rows=200, channels=6, out=4):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) + 0.5
    y = torch.randn(rows, out, generator=generator)
    moments = CrossMoments(out, channels)
    moments.update(y, x)
    return x, y, moments, torch.randn(out, channels, generator=generator), torch.randn(out, generator=generator)


@given(st.integers(0, 99))
def test_without_ridge_it_is_least_squares(seed):
    x, y, moments, weight, _ = _problem(seed)
    expected = torch.linalg.lstsq(x.double(), y.double()).solution.T.float()
    found, none = two_step(weight, None, moments, ridge=0.0)
    assert none is None
    assert torch.allclose(found, expected, atol=1e-3)


@given(st.integers(0, 99))
def test_with_a_bias_it_is_least_squares_with_an_intercept(seed):
    x, y, moments, weight, bias = _problem(seed)
    ones = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    expected = torch.linalg.lstsq(ones.double(), y.double()).solution.T.float()
    found, offset = two_step(weight, bias, moments, ridge=0.0)
    assert torch.allclose(found, expected[:, :-1], atol=1e-3)
    assert torch.allclose(offset, expected[:, -1], atol=1e-3)


@given(st.integers(0, 99), st.floats(1e-3, 10))
def test_the_ridge_pulls_towards_the_present_weights(seed, ridge):
    x, y, moments, weight, _ = _problem(seed)
    lam = ridge * float(moments.x.second_moment.diagonal().mean())
    scale = (lam * len(x)) ** 0.5
    rows = torch.cat([x.double(), scale * torch.eye(x.shape[1], dtype=torch.float64)])
    targets = torch.cat([y.double(), scale * weight.double().T])
    expected = torch.linalg.lstsq(rows, targets).solution.T.float()
    found, _ = two_step(weight, None, moments, ridge=ridge)
    assert torch.allclose(found, expected, atol=1e-3)


@given(st.integers(0, 99), st.floats(0, 10), st.booleans())
def test_the_calibration_error_never_rises(seed, ridge, with_bias):
    _, _, moments, weight, bias = _problem(seed)
    own = bias if with_bias else None
    found, offset = two_step(weight, own, moments, ridge=ridge)
    assert moments.residual(found, offset) <= moments.residual(weight, own) + 1e-6


def test_a_huge_ridge_leaves_the_weights_alone():
    _, _, moments, weight, _ = _problem(0)
    assert torch.allclose(two_step(weight, None, moments, ridge=1e9)[0], weight, atol=1e-4)


def test_too_few_tokens_are_damped_and_dead_inputs_left_alone():
    moments = CrossMoments(2, 8)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    moments.update(x[:, :2], x)
    found, _ = two_step(torch.zeros(2, 8), None, moments, ridge=0.0)
    assert bool(torch.isfinite(found).all())
    dead = CrossMoments(2, 8)
    dead.update(torch.zeros(4, 2), torch.zeros(4, 8))
    weight = torch.ones(2, 8)
    assert torch.equal(two_step(weight, None, dead, ridge=0.01)[0], weight)


def test_moments_that_cannot_be_factored_are_named():
    moments = CrossMoments(1, 2)
    moments.x.tokens = 10
    moments.x.gram = torch.tensor([[1.0, 500.0], [500.0, 1.0]], dtype=torch.float64)
    with pytest.raises(CalibrationError, match=r"10 tokens cannot determine 2 channels\. Use at least 8 tokens"):
        two_step(torch.ones(1, 2), None, moments, ridge=0.0)
