import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from prunelm.allocators import ALLOCATORS
from prunelm.errors import BudgetError
from prunelm.plan import Budget, Plan, check_sparsity, order_of, parameters_of, prunable, top_units
from prunelm.sites import find_sites
from prunelm.testing import made_up_measurements, tiny_model

SITES = {unit: find_sites(tiny_model("llama", num_hidden_layers=3), unit) for unit in ("group", "query")}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.data())
def test_the_highest_scores_stay(values, data):
    scores = torch.tensor(values, dtype=torch.float64)
    keep = data.draw(st.integers(1, len(values)))
    kept = top_units(scores, keep)
    assert len(kept) == keep
    assert kept.tolist() == sorted(set(kept.tolist()))
    gone = [i for i in range(len(values)) if i not in kept.tolist()]
    assert not gone or float(scores[gone].max()) <= float(scores[kept].min())


def test_of_equal_scores_the_lower_index_goes():
    assert top_units(torch.zeros(5, dtype=torch.float64), 2).tolist() == [3, 4]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 99), st.data())
def test_every_stratum_keeps_the_same_number(strata, per, seed, data):
    keep = data.draw(st.integers(1, per))
    scores = torch.rand(strata * per, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    kept = top_units(scores, keep * strata, strata)
    assert torch.bincount(kept // per, minlength=strata).tolist() == [keep] * strata
    assert order_of(scores, strata)[: keep * strata].sort().values.tolist() == kept.tolist()


@pytest.mark.parametrize("name", sorted(ALLOCATORS))
@given(
    sparsity=st.floats(0.02, 0.95),
    multiple_of=st.sampled_from([1, 4, 16]),
    share=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    unit=st.sampled_from(["group", "query"]),
    min_units=st.integers(1, 2),
)
def test_a_budget_is_met_within_one_step_or_refused(name, sparsity, multiple_of, share, unit, min_units):
    sites = SITES[unit]
    total = prunable(sites)
    budget = Budget(
        target=math.floor(sparsity * total),
        total=total,
        multiple_of=multiple_of,
        attention_share=share,
        min_units=min_units,
    )
    try:
        counts, step = ALLOCATORS[name](sites, budget, *made_up_measurements(name, sites, budget))
    except BudgetError as error:
        assert "cannot be met by whole units" in str(error)  # noqa: PT017
        assume(False)
        return
    plan = Plan({site.key: torch.arange(counts[site.key]) for site in sites})
    plan.check(sites, budget, step)
    assert all(counts[site.key] >= min_units * site.strata for site in sites)
    assert all(counts[site.key] % site.strata == 0 for site in sites)
    if name == "uniform":
        assert len({(site.name, counts[site.key]) for site in sites}) == 2


def test_a_plan_that_misses_the_budget_is_refused():
    sites = SITES["group"]
    total = prunable(sites)
    budget = Budget(target=total // 2, total=total)
    with pytest.raises(BudgetError, match="the plan removes 0 parameters"):
        Plan({site.key: torch.arange(site.n_units) for site in sites}).check(sites, budget, 10)
    with pytest.raises(BudgetError, match="sorted, unique"):
        Plan({sites[0].key: torch.tensor([1, 1])}).check(sites, budget, 10)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2, float("nan"), float("inf"), 10**400])
def test_a_sparsity_outside_its_range_is_refused(sparsity, without_type_checks):
    with pytest.raises(BudgetError, match=r"sparsity must be in \[0, 1\), got"):
        check_sparsity(sparsity)


def test_sparsity_zero_is_refused_loudly():
    with pytest.raises(BudgetError, match="sparsity 0 removes nothing"):
        check_sparsity(0.0)


@given(st.integers(1, 10**9), st.integers(1, 99))
def test_a_share_that_is_whole_parameters_takes_them_all(hundredth, percent):
    assert parameters_of(percent / 100, 100 * hundredth) == percent * hundredth


def test_a_share_is_rounded_down():
    assert parameters_of(0.3, 11) == 3
    assert parameters_of(0.7, 2880) == 2016
    assert parameters_of(math.nextafter(0.5, 0), 10**11) == 5 * 10**10
    assert parameters_of(0.4999999999, 10**11) == 49_999_999_990
