"""Descent finds plans that do less damage, meets the budget, and goes on where it was interrupted."""

from contextlib import contextmanager

import pytest
import torch

from prunelm.descent import _State, _View, bowl_through, coarse, descend, line_through, within
from prunelm.fisher import output_fisher
from prunelm.journal import Journal
from prunelm.knapsack import knapsack
from prunelm.plan import Budget, prunable
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.rehearsal import Rehearsal, put_
from prunelm.sensitivity import Divergence, rehearsed
from prunelm.sites import find_sites, weight_of
from prunelm.stream import BlockStream
from prunelm.testing import site_statistics, tiny_inputs, tiny_model

ROUNDS = 6


@contextmanager
def _search(family="llama", kinds=("ffn",)):
    """The arguments of a search on a tiny model, whose start takes all it can from the first sites."""
    model = tiny_model(family, num_hidden_layers=3)
    sites = [site for site in find_sites(model) if site.name in kinds]
    batches = [tiny_inputs(model, seed=seed) for seed in range(3)]
    total = prunable(sites)
    budget = Budget(target=total // 3, total=total)
    curves, scores, moments = {}, {}, {}
    for site in sites:
        scores[site.key] = torch.rand(site.n_units, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        curves[site.key] = torch.linspace(0, 1, site.n_units + 1, dtype=torch.float64) ** 2
        moments[site.key] = site_statistics(model, site).consumer
    unfair = {s.key: (1.0 + s.block) ** 3 * curves[s.key][budget.options(s)] for s in sites}
    divergence = Divergence(BlockStream(model, batches), [2])
    start = knapsack(sites, budget, unfair)
    with Rehearsal(sites, scores, moments, RECONSTRUCTIONS["least-squares"], 0.1) as rehearsal:
        yield sites, budget, start, rehearsal, divergence, curves


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_descent_finds_a_better_plan_within_its_rounds(family):
    with _search(family) as search:
        sites, budget, start, rehearsal, divergence = search[:5]
        found = descend(*search, rounds=ROUNDS)
        assert found.divergence < found.start
        assert 1 < found.tried <= ROUNDS + 1
        removed = {s.key: s.n_units - found.counts[s.key] for s in sites}
        assert budget.target - found.step < sum(removed[s.key] * s.cost for s in sites) <= budget.target
        rehearsal.apply(removed)
        assert divergence.measure(0, divergence.entering) == pytest.approx(found.divergence, rel=1e-5)
        assert all(price > 0 for price in found.prices.values())
        assert found.counts != start[0]


def test_no_rounds_keep_the_start():
    with _search() as search:
        found = descend(*search, rounds=0)
        assert found.counts == search[2][0]
        assert found.divergence == found.start
        assert found.tried == 1


def test_only_plans_that_were_measured_are_counted(monkeypatch):
    measured = []

    def counted(*args):
        measured.append(args)
        return rehearsed(*args)

    monkeypatch.setattr("prunelm.descent.rehearsed", counted)
    with _search() as search:
        found = descend(*search, rounds=ROUNDS)
        assert found.tried == len(measured)
        monkeypatch.setattr("prunelm.descent.knapsack", lambda *_: (found.counts, found.step))
        again = descend(*search[:2], (found.counts, found.step), *search[3:], rounds=ROUNDS)
    assert again.tried == 1
    assert again.counts == found.counts


def test_an_interrupted_descent_ends_as_a_whole_one(tmp_path):
    with _search() as search:
        whole = descend(*search, rounds=ROUNDS)
    path, calls = tmp_path / "search.jsonl", []

    def interrupt(_stage, done, _total):
        calls.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with _search() as search, pytest.raises(KeyboardInterrupt):
        descend(*search, rounds=ROUNDS, journal=Journal(path), progress=interrupt)
    before = len(path.read_text().splitlines())
    with _search() as search:
        again = descend(*search, rounds=ROUNDS, journal=Journal(path))
    assert again == whole
    assert len(path.read_text().splitlines()) > before


def test_a_rehearsal_leaves_the_model_as_it_was():
    with _search() as search:
        sites = search[0]
        before = {s.key: weight_of(s.consumer.layer).clone() for s in sites}
        descend(*search, rounds=2)
        assert any(not torch.equal(weight_of(s.consumer.layer), before[s.key]) for s in sites)
    assert all(torch.equal(weight_of(s.consumer.layer), before[s.key]) for s in sites)


def test_slopes_are_those_of_the_measured_divergence():
    with _search() as search:
        sites, _, start, rehearsal, divergence = search[:5]
        rehearsal.apply({s.key: s.n_units - start[0][s.key] for s in sites})
        slopes = divergence.slopes(sites)
        for site in (sites[0], sites[-1]):
            weight = weight_of(site.consumer.layer).detach()
            direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3
            values = []
            for sign in (1, -1):
                weight.add_(direction, alpha=sign)
                values.append(divergence.measure(0, divergence.entering))
                weight.sub_(direction, alpha=sign)
            expected = float((slopes[site.key].weight * direction).sum())
            assert (values[0] - values[1]) / 2 == pytest.approx(expected, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_what_is_expected_of_a_site_is_the_slope_along_its_new_repair_bias_included(family):
    with _search(family) as search:
        sites, budget, start, rehearsal, divergence = search[:5]
        removed = {s.key: s.n_units - start[0][s.key] for s in sites}
        fisher = {s.key: torch.eye(len(weight_of(s.consumer.layer)), dtype=torch.float64) for s in sites}
        view = _View(sites, budget, rehearsal, divergence, fisher)
        slopes = view.slopes(removed)
        for site in sites:
            at = removed[site.key]
            to = at + 2 if at + 2 < site.n_units else at - 2
            expected, _ = view._change(site, slopes[site.key], at, to)
            old, new = rehearsal.layer(site.key, at), rehearsal.layer(site.key, to)
            values = []
            for share in (1e-3, -1e-3):
                moved = [None if a is None else a + share * (b - a) for a, b in zip(old, new, strict=True)]
                put_(site.consumer.layer, *moved)
                values.append(divergence.measure(0, divergence.entering))
                put_(site.consumer.layer, *old)
            assert (values[0] - values[1]) / 2e-3 == pytest.approx(expected, rel=0.05, abs=2e-5)


def test_the_trust_region_is_whole_options():
    assert within([0, 2, 4, 6, 8], 4, 2.5) == (2, 6)
    assert within([0, 2, 4, 6, 8], 4, 0.1) == (2, 6)
    assert within([0, 2, 4, 6, 8], 4, 100.0) == (0, 8)
    assert within([0, 2], 0, 1.0) == (0, 2)
    assert within([3], 3, 1.0) == (3, 3)


def test_a_site_is_coarse_where_one_step_is_more_than_the_first_trust():
    assert coarse([0, 1, 2], 3)
    assert not coarse([0, 16, 32], 128)
    assert not coarse([0], 3)


def test_coarse_sites_stay_once_their_leaps_bring_too_little():
    with _search(kinds=("attention", "ffn")) as search:
        sites, budget, start, rehearsal, divergence, _ = search
        removed = {s.key: s.n_units - start[0][s.key] for s in sites}
        fisher = output_fisher(divergence.stream.model, divergence.whole, sites, seed=0)
        view = _View(sites, budget, rehearsal, divergence, fisher)
        free, held = (view.damage(_State(removed=removed, divergence=0.0, step=1, settled=x)) for x in (False, True))
        few = [s for s in sites if coarse(view.options[s.key], s.n_units)]
        assert few
        for site in sites:
            count = int(held[site.key].isfinite().sum())
            assert count == (1 if site in few else int(free[site.key].isfinite().sum()))


def test_between_the_ends_slopes_are_smooth_and_curvatures_never_negative():
    assert line_through(2, {0: -4.0, 4: 12.0}, [0, 1, 2, 3, 4]).tolist() == pytest.approx([-4, -3, 0, 5, 12])
    assert line_through(2, {4: 6.0}, [2, 3, 4]).tolist() == pytest.approx([0, 3, 6])
    assert line_through(2, {}, [2]).tolist() == [0]
    assert bowl_through(4, {0: 4.0, 6: 6.0}, [0, 2, 4, 5, 6]).tolist() == pytest.approx([4, 1, 0, 1.5, 6])
    assert bowl_through(0, {2: 1.0}, [0, 1, 2]).tolist() == [0, 0.25, 1]
