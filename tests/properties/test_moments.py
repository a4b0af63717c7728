import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.errors import CalibrationError
from prunelm.moments import CrossMoments, Moments, products, squares


def _data(rows, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, channels, generator=generator) + torch.randn(channels, generator=generator)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 99), st.data())
def test_order_and_chunking_change_nothing(rows, channels, seed, data):
    a = _data(rows, channels, seed)
    whole, parts = Moments(channels), Moments(channels)
    whole.update(a)
    cut = data.draw(st.integers(1, rows - 1))
    for part in (a[cut:], a[:cut]):
        parts.update(part)
    assert parts.tokens == whole.tokens == rows
    assert torch.allclose(parts.gram, whole.gram, atol=1e-4)
    assert torch.allclose(parts.mean, whole.mean, atol=1e-5)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 99))
def test_moments_are_what_numpy_would_say(rows, channels, seed):
    a = _data(rows, channels, seed)
    full, diagonal = Moments(channels), Moments(channels, full=False)
    full.update(a)
    diagonal.update(a)
    assert torch.allclose(full.covariance.float(), torch.cov(a.T, correction=0).reshape(channels, channels), atol=1e-4)
    assert torch.allclose(full.energy, diagonal.energy, atol=1e-5)
    assert bool((torch.linalg.eigvalsh(full.second_moment) > -1e-6).all())


@given(st.integers(5, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_closed_form_residual_equals_the_measured_one(rows, channels, out, seed, with_bias):
    x, y = _data(rows, channels, seed), _data(rows, out, seed + 1)
    weight = _data(out, channels, seed + 2)
    bias = _data(1, out, seed + 3)[0] if with_bias else None
    moments = CrossMoments(out, channels)
    moments.update(y, x)
    fit = x @ weight.T + (bias if bias is not None else 0)
    measured = float((y - fit).square().sum() / y.square().sum())
    assert moments.residual(weight, bias) == pytest.approx(measured, rel=1e-4, abs=1e-5)


def test_mapped_moments_are_the_moments_of_the_mapped_target():
    x, t = _data(30, 4, 0), _data(30, 3, 1)
    weight, bias = _data(5, 3, 2), _data(1, 5, 3)[0]
    plain, direct = CrossMoments(3, 4), CrossMoments(5, 4)
    plain.update(t, x)
    direct.update(t @ weight.T + bias, x)
    mapped = plain.mapped(weight, bias)
    assert torch.allclose(mapped.cross, direct.cross, atol=1e-4)
    assert torch.allclose(mapped.y_total, direct.y_total, atol=1e-4)


def test_non_finite_statistics_name_the_site_and_the_channels():
    moments = Moments(3)
    moments.update(torch.tensor([[1.0, float("inf"), 2.0]]))
    with pytest.raises(CalibrationError, match=r"block 4, 4\.ffn: 3 of 3 channels have non-finite statistics after 1"):
        moments.check("block 4, 4.ffn")
    with pytest.raises(CalibrationError, match="no token reached it"):
        Moments(3).check("here")


def test_the_diagonal_alone_has_no_covariance():
    moments = Moments(3, full=False)
    moments.update(torch.ones(2, 3))
    with pytest.raises(ValueError, match="only the diagonal"):
        _ = moments.covariance


@given(st.integers(1, 11), st.integers(1, 6), st.integers(0, 99))
def test_half_mirrored_squares_are_the_products(channels, tokens, seed):
    a = torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(squares(a), products(a, a), atol=1e-6)
