import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunelm.errors import BudgetError
from prunelm.knapsack import knapsack
from prunelm.plan import Budget, prunable
from prunelm.sensitivity import damage_of
from prunelm.sites import find_sites
from prunelm.testing import tiny_model

SITES = find_sites(tiny_model("llama"))


def _damage(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for site in SITES:
        steps = torch.rand(len(budget.options(site)), generator=generator).double() ** 3
        steps[0] = 0
        found[site.key] = steps.cumsum(0)
    return found


def _budget(sparsity, multiple_of):
    total = prunable(SITES)
    return Budget(target=int(sparsity * total), total=total, multiple_of=multiple_of)


@given(st.integers(0, 500), st.floats(0.1, 0.65))
def test_it_equals_brute_force(seed, sparsity):
    budget = _budget(sparsity, 8)
    damage = _damage(seed, budget)
    counts, step = knapsack(SITES, budget, damage)
    removed = sum((s.n_units - counts[s.key]) * s.cost for s in SITES)
    assert budget.target - step < removed <= budget.target
    found = sum(float(damage[s.key][budget.options(s).index(s.n_units - counts[s.key])]) for s in SITES)
    options = [range(len(budget.options(s))) for s in SITES]
    plans = []
    for plan in itertools.product(*options):
        size = sum(budget.options(s)[n] * s.cost for s, n in zip(SITES, plan, strict=True))
        plans.append((size, sum(float(damage[s.key][n]) for s, n in zip(SITES, plan, strict=True))))
    reachable = max(size for size, _ in plans if size <= budget.target)
    least = min(price for size, price in plans if reachable - step < size <= budget.target)
    assert found == pytest.approx(least, abs=1e-9)


@given(st.integers(0, 500))
def test_coarse_sums_still_meet_the_budget(seed):
    budget = _budget(0.37, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("prunelm.knapsack.STATES", 50)
        counts, step = knapsack(SITES, budget, _damage(seed, budget))
    removed = sum((s.n_units - counts[s.key]) * s.cost for s in SITES)
    assert budget.target - step < removed <= budget.target


def test_budgets_out_of_reach_are_refused_with_numbers():
    budget = _budget(0.99, 8)
    with pytest.raises(BudgetError, match="at most"):
        knapsack(SITES, budget, _damage(0, budget))
    budget = _budget(0.001, 8)
    with pytest.raises(BudgetError, match="nothing would go"):
        knapsack(SITES, budget, _damage(0, budget))


def test_damage_goes_through_the_measured_points_and_never_falls():
    curve = torch.linspace(0, 1, 11).double() ** 2
    found = damage_of(curve, [(3, 0.02), (7, 0.3)], list(range(11)))
    assert found[0] == 0
    assert float(found[3]) == pytest.approx(0.02, rel=1e-6)
    assert float(found[7]) == pytest.approx(0.3, rel=1e-6)
    assert bool((found.diff() >= 0).all())


def test_one_measured_point_is_scaled_with_the_error():
    curve = torch.tensor([0.0, 0.1, 0.4])
    assert torch.allclose(damage_of(curve, [(1, 0.05)], [0, 1, 2]), torch.tensor([0.0, 0.05, 0.2]).double())


def test_floors_are_paid_exactly_however_coarse_the_sums_are(monkeypatch):
    ffns = [site for site in SITES if site.name == "ffn"]
    floor = {site.key: 7 for site in ffns}
    spent, cost = sum(7 * site.cost for site in ffns), ffns[0].cost
    monkeypatch.setattr("prunelm.knapsack.STATES", 5)
    for more in range(1, 6):
        budget = Budget(target=spent + more * cost, total=prunable(ffns), floor=floor)
        damage = {site.key: torch.arange(len(budget.options(site)), dtype=torch.float64) for site in ffns}
        counts, _ = knapsack(ffns, budget, damage)
        assert sum((site.n_units - counts[site.key]) * cost for site in ffns) == budget.target
        assert all(site.n_units - counts[site.key] >= 7 for site in ffns)
    short = Budget(target=spent - cost, total=prunable(ffns), floor=floor)
    with pytest.raises(BudgetError, match=f"at least {spent:,} must go, and the budget says {spent - cost:,}"):
        knapsack(ffns, short, {site.key: torch.zeros(len(short.options(site))).double() for site in ffns})


def test_what_must_go_has_its_damage_too():
    curve = torch.linspace(0, 1, 11).double() ** 2
    points = [(3, 0.02), (7, 0.3)]
    whole = damage_of(curve, points, list(range(11)))
    assert torch.equal(damage_of(curve, points, [4, 6, 8]), whole[[4, 6, 8]])
    assert damage_of(curve, [], [4]).tolist() == [0.0]
