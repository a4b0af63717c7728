from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.criteria import CRITERIA
from prunelm.elimination import eliminate
from prunelm.errors import RecipeError
from prunelm.moments import CrossMoments, Moments
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.reconstructions.bias import bias_only
from prunelm.reconstructions.least_squares import least_squares
from prunelm.repairing import exchanged_units, repaired
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.testing import site_statistics, tiny_model


def _problem(seed, channels=9, out=4, rows=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) @ torch.randn(channels, channels, generator=generator) + 0.5
    return torch.randn(out, channels, generator=generator), x


def _moments(x):
    moments = Moments(x.shape[1])
    moments.update(x)
    return moments


def _refitted_error(weight, second, gone):
    """tr of what least squares leaves when the channels `gone` are removed."""
    kept = [c for c in range(len(second)) if c not in gone]
    w, s = weight.double(), second
    fit = torch.linalg.solve(s[kept][:, kept], s[kept] @ w.T).T
    left = w.clone()
    left[:, kept] -= fit
    return float(((left @ s) * left).sum())


@given(st.integers(0, 200), st.sampled_from([1, 3]))
def test_the_running_sum_is_the_error_after_refitting(seed, width):
    weight, x = _problem(seed)
    second = _moments(x).second_moment
    units = torch.arange(9).reshape(-1, width)
    order, costs = eliminate(weight, torch.linalg.inv(second), units)
    assert sorted(order.tolist()) == list(range(len(units)))
    for k in range(1, len(units)):
        gone = set(units[order[:k]].flatten().tolist())
        assert float(costs[:k].sum()) == pytest.approx(_refitted_error(weight, second, gone), rel=1e-3, abs=1e-6)


@given(st.integers(0, 200), st.sampled_from([1, 3]))
def test_each_step_takes_the_cheapest_unit(seed, width):
    weight, x = _problem(seed)
    second = _moments(x).second_moment
    units = torch.arange(9).reshape(-1, width)
    order, _ = eliminate(weight, torch.linalg.inv(second), units)
    gone: list[int] = []
    for unit in order[:-1].tolist():
        left = [u for u in range(len(units)) if u not in gone]
        errors = {u: _refitted_error(weight, second, set(units[[*gone, u]].flatten().tolist())) for u in left}
        assert errors[unit] <= min(errors.values()) * (1 + 1e-6) + 1e-9
        gone.append(unit)


def test_blocks_of_downdates_change_nothing(monkeypatch):
    weight, x = _problem(1, channels=40, rows=200)
    second, units = _moments(x).second_moment, torch.arange(40)[:, None]
    whole = eliminate(weight, torch.linalg.inv(second), units)
    monkeypatch.setattr("prunelm.elimination.BLOCK", 3)
    parts = eliminate(weight, torch.linalg.inv(second), units)
    assert torch.equal(whole[0], parts[0])
    assert torch.allclose(whole[1], parts[1], rtol=1e-6)


def test_every_stratum_loses_one_unit_before_any_loses_two():
    weight, x = _problem(3, channels=12, rows=100)
    order, _ = eliminate(weight, torch.linalg.inv(_moments(x).second_moment), torch.arange(12).reshape(6, 2), strata=3)
    rounds = [sorted(u // 2 for u in part) for part in (order[:3].tolist(), order[3:].tolist())]
    assert rounds == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["attention", "ffn"])
@torch.no_grad()
def test_obs_scores_are_the_error_curve_of_the_repaired_module(family, name, monkeypatch):
    model = tiny_model(family)
    site = next(s for s in find_sites(model) if s.name == name)
    statistics, found = site_statistics(model, site), []
    monkeypatch.setattr("prunelm.criteria.obs.eliminate", lambda *a, **o: found.append(eliminate(*a, **o)) or found[0])
    scores = CRITERIA["obs"](site, statistics, ridge=1e-4)
    weight, bias = weight_of(site.consumer.layer), bias_of(site.consumer.layer)
    order, costs = found[0]
    ordered = scores[order]
    assert bool((costs >= 0).all())
    assert bool((ordered.diff() >= 0).all())
    moments = CrossMoments.of_layer(statistics.consumer, weight, bias)
    centred = moments.y_square.sum() / moments.x.tokens
    if bias is not None:
        centred = centred - (moments.y_total / moments.x.tokens).square().sum()
    energy = moments.y_square.sum() / moments.x.tokens
    for removed in range(1, site.n_units - 1):
        kept = site.consumer.keep(order[removed:].sort().values)
        new = least_squares(weight, bias, moments, kept, ridge=1e-4)
        error = moments.residual(*new, kept) * float(energy / centred)
        # The score counts the damping too, so it is never below the error that the repair leaves.
        assert error <= float(ordered[removed - 1]) * (1 + 1e-3) + 1e-6
        assert float(ordered[removed - 1]) - error < 1e-2


@given(st.integers(0, 200), st.booleans(), st.integers(1, 8))
def test_none_bias_and_least_squares_are_ordered_on_the_tokens_fitted(seed, with_bias, keep):
    weight, x = _problem(seed)
    bias = torch.randn(4, generator=torch.Generator().manual_seed(seed)) if with_bias else None
    moments = CrossMoments.of_layer(_moments(x), weight, bias)
    kept = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:keep].sort().values
    none = moments.residual(weight[:, kept], bias, kept)
    mean = moments.residual(*bias_only(weight, bias, moments, kept), kept)
    best = moments.residual(*least_squares(weight, bias, moments, kept, ridge=0.0), kept)
    assert none + 1e-6 >= mean
    assert mean + 1e-6 >= best


@given(st.integers(0, 200), st.booleans())
def test_a_repair_is_never_worse_on_held_out_tokens_than_its_guards(seed, with_bias):
    weight, x = _problem(seed, rows=40)
    bias = torch.randn(4, generator=torch.Generator().manual_seed(seed)) if with_bias else None
    fit, held = (CrossMoments.of_layer(_moments(rows), weight, bias) for rows in (x[:20], x[20:]))
    kept = torch.tensor([0, 2, 3, 5, 8])
    found = repaired(RECONSTRUCTIONS["least-squares"], weight, bias, fit, held, kept, ridge=0.1)
    error = held.residual(found.weight, found.bias, kept)
    assert error == pytest.approx(min(found.errors.values()), rel=1e-6, abs=1e-9)
    assert error <= held.residual(weight[:, kept], bias, kept) + 1e-9
    assert error <= held.residual(*bias_only(weight, bias, fit, kept), kept) + 1e-9


@given(st.integers(0, 200), st.floats(0, 1), st.booleans())
def test_blended_targets_are_the_moments_of_the_blend(seed, share, with_bias):
    weight, x = _problem(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(4, generator=generator) if with_bias else None
    dense = torch.randn(60, 4, generator=generator)
    own = x @ weight.T + (0 if bias is None else bias)
    expected, found = CrossMoments(4, 9), CrossMoments(4, 9)
    expected.update(share * dense + (1 - share) * own, x)
    found.update(dense, x)
    found = found.blended(weight, bias, share)
    for name in ("cross", "y_total", "y_square"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-2), name


@pytest.mark.parametrize(("seed", "size"), [*((seed, 1.0) for seed in range(4)), *((seed, 1e3) for seed in range(8))])
@torch.no_grad()
def test_channels_that_are_always_the_same_break_nothing_and_go_first_where_rounding_is_small(seed, size):
    model = tiny_model("opt")
    site = next(s for s in find_sites(model) if s.name == "ffn")
    same, generator = [1, 4, 7], torch.Generator().manual_seed(seed)
    x = torch.randn(600, site.n_units, generator=generator)
    x[:, same] = size * (0.5 + torch.rand(len(same), generator=generator))
    moments = Moments(site.n_units)
    for chunk in x.split(150):
        moments.update(chunk)
    assert bool((moments.covariance.diagonal()[same].abs() < moments.rounding(torch.ones(1))[same]).all())
    scores = CRITERIA["obs"](site, replace(site_statistics(model, site), consumer=moments))
    kept, _ = exchanged_units(site, moments, torch.arange(8), limit=8, ridge=1e-2)
    assert bool(scores.isfinite().all())
    assert len(kept) == 8
    if size == 1:
        assert sorted(scores.argsort()[: len(same)].tolist()) == same
        assert not set(kept.tolist()) & set(same)


def test_a_ridge_below_0_is_refused():
    with pytest.raises(RecipeError, match="ridge must be a number from 0 up"):
        CRITERIA["obs"].needs(ridge=-1.0)
