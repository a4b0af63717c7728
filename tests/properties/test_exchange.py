"""Exchanges never raise the error that is left after refitting, and end where no single exchange helps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.elimination import eliminate
from prunelm.exchange import _swept, _worth, exchanged


def _problem(seed, channels=8, out=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, channels, generator=generator) @ torch.randn(channels, channels, generator=generator)
    second = (x.T @ x).double() / len(x) + 1e-3 * torch.eye(channels, dtype=torch.float64)
    return torch.randn(out, channels, generator=generator), second


def _error(weight, second, kept_channels):
    """tr of what least squares leaves of W when only these channels are kept."""
    w, k = weight.double(), kept_channels
    left = w.clone()
    left[:, k] -= torch.linalg.solve(second[k][:, k], second[k] @ w.T).T
    return float(((left @ second) * left).sum())


@given(st.integers(0, 300), st.sampled_from([1, 2]), st.integers(1, 3))
def test_the_error_never_rises_and_the_number_stays(seed, width, keep):
    weight, second = _problem(seed)
    units = torch.arange(8).reshape(-1, width)
    start = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    kept, made = exchanged(weight, second, units, start, limit=20)
    before, after = (_error(weight, second, units[k].flatten()) for k in (start, kept))
    assert len(kept) == keep
    assert after <= before + 1e-9
    assert (made == 0) == (kept.tolist() == start.tolist()) or made > 0
    again, more = exchanged(weight, second, units, kept, limit=20)
    assert more == 0 or made == 20
    assert again.tolist() == kept.tolist() or made == 20


@given(st.integers(0, 300))
def test_what_a_unit_is_worth_is_the_change_of_the_error(seed):
    weight, second = _problem(seed)
    units, kept = torch.arange(8)[:, None], [1, 4, 6]
    cross = weight.double() @ second
    table = torch.cat([torch.cat([second, cross.T], 1), torch.cat([cross, cross @ weight.double().T], 1)])
    swept = _swept(table, torch.tensor(kept))
    worth = _worth(swept, units, torch.arange(8, 11))
    now = _error(weight, second, kept)
    for unit in range(8):
        other = [k for k in kept if k != unit] if unit in kept else sorted([*kept, unit])
        assert float(worth[unit]) == pytest.approx(abs(_error(weight, second, other) - now), rel=1e-6, abs=1e-8)
    assert torch.allclose(_swept(swept, torch.tensor(kept), back=True), table, atol=1e-8)


def test_a_bad_start_comes_close_to_elimination():
    weight, second = _problem(5, channels=12)
    units = torch.arange(12)[:, None]
    order, _ = eliminate(weight, torch.linalg.inv(second), units)
    worst, best = order[:5].sort().values, order[7:].sort().values
    kept, made = exchanged(weight, second, units, worst, limit=50)
    errors = {name: _error(weight, second, k) for name, k in (("worst", worst), ("kept", kept), ("best", best))}
    assert made > 1
    assert errors["kept"] - errors["best"] < 0.5 * (errors["worst"] - errors["best"])


def test_strata_keep_their_numbers():
    weight, second = _problem(2)
    units = torch.arange(8)[:, None]
    kept, _ = exchanged(weight, second, units, torch.tensor([0, 1, 4, 5]), limit=20, strata=2)
    assert (kept < 4).sum() == 2
