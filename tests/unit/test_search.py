import pytest
import torch

from prunelm.allocators.uniform import split, uniform_plans
from prunelm.data import Batches
from prunelm.errors import DataError
from prunelm.knapsack import knapsack
from prunelm.plan import Budget, prunable
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.search import bent, judge_of, pick, refine
from prunelm.sensitivity import Divergence, repaired_in_place
from prunelm.sites import find_sites, narrow_, set_weight_
from prunelm.stream import BlockStream
from prunelm.survey import Survey
from prunelm.testing import made_up_measurements, outputs, site_statistics, tiny_inputs, tiny_model

SITES = find_sites(tiny_model("llama", num_hidden_layers=3))
TOTAL = prunable(SITES)
BUDGET = Budget(target=TOTAL // 3, total=TOTAL)
PRICES = made_up_measurements("sensitivity", SITES, BUDGET)[0]
KEYS = [site.key for site in SITES]


def _distance(counts):
    """A judge with its optimum away from the plan of the prices: late blocks should stay wide."""
    return sum((s.n_units - counts[s.key]) / s.n_units * (1 + s.block) ** 2 for s in SITES)


def _calibration(model, batches=8):
    found = [tiny_inputs(model, seed=seed) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches})


def test_a_search_finds_a_better_plan_within_its_number_of_candidates():
    seen = []

    def judge(counts):
        seen.append(counts)
        return _distance(counts)

    found = refine(SITES, BUDGET, PRICES, judge, candidates=12)
    assert found.divergence < found.start == _distance(knapsack(SITES, BUDGET, PRICES)[0])
    assert found.divergence == _distance(found.counts) == min(map(_distance, seen))
    assert len(seen) == found.tried <= 12
    removed = sum((s.n_units - found.counts[s.key]) * s.cost for s in SITES)
    assert BUDGET.target - found.step < removed <= BUDGET.target


def test_a_search_that_finds_nothing_better_keeps_its_start():
    start = knapsack(SITES, BUDGET, PRICES)[0]
    found = refine(SITES, BUDGET, PRICES, lambda counts: float(counts != start), candidates=9)
    assert found.counts == start
    assert found.divergence == found.start == 0


def test_an_interrupted_search_goes_on_where_it_stopped():
    whole = refine(SITES, BUDGET, PRICES, _distance, candidates=12)
    known, calls = {}, []

    def judge(counts):
        calls.append(counts)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return _distance(counts)

    with pytest.raises(KeyboardInterrupt):
        refine(SITES, BUDGET, PRICES, judge, candidates=12, known=known)
    assert len(known) == 4
    again = refine(SITES, BUDGET, PRICES, judge, candidates=12, known=known)
    assert again == whole
    assert len(calls) == 5 + whole.tried - 4


def test_bends_make_what_they_name_dearer():
    flat = dict.fromkeys(("attention", "depth", "middle", "evenness"), 0.0)
    price = {name: {k: float(v[-1]) for k, v in bent(SITES, PRICES, {**flat, name: 0.5}).items()} for name in flat}
    plain = {k: float(v[-1]) for k, v in bent(SITES, PRICES, flat).items()}
    ratio = {name: {k: price[name][k] / plain[k] for k in KEYS} for name in flat}
    assert ratio["attention"]["0.attention"] > 1 == pytest.approx(ratio["attention"]["0.ffn"])
    assert ratio["depth"]["2.ffn"] > 1 > ratio["depth"]["0.ffn"]
    assert ratio["middle"]["1.ffn"] > 1 > ratio["middle"]["0.ffn"]
    assert set(bent(SITES, PRICES, flat)) == set(KEYS)


def test_equal_widths_are_chosen_by_what_is_measured():
    plans = list(uniform_plans(SITES, BUDGET))
    assert len(plans) > 1
    attention = [counts["0.attention"] for counts, _ in plans]
    assert len(set(attention)) == len(plans)
    found = pick(SITES, plans, lambda counts: float(abs(counts["0.attention"] - attention[-1])), target=0, candidates=9)
    assert found.counts == plans[-1][0]
    assert split(SITES, BUDGET, PRICES) in plans


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_divergence_of_a_plan_is_that_of_the_narrowed_model(family):
    """Judging a plan in place gives what narrowing and repairing the weights would give."""
    model, narrowed = tiny_model(family), tiny_model(family)
    stream = BlockStream(model, [tiny_inputs(model, seed=3)])
    divergence = Divergence(stream, [0])
    assert divergence.measure(0, divergence.entering) == pytest.approx(0, abs=1e-6)
    site, twin = (next(s for s in find_sites(m) if s.name == "ffn") for m in (model, narrowed))
    statistics = site_statistics(model, site)
    scores = torch.rand(site.n_units, generator=torch.Generator().manual_seed(0))
    repair = RECONSTRUCTIONS["least-squares"]
    removed = site.n_units // 2
    with repaired_in_place(site, scores, statistics.consumer, removed, repair, 0.1):
        found = divergence.measure(0, divergence.entering)
        columns = site.consumer.keep(scores.argsort()[removed:])
        weight, bias = site.consumer.layer.weight.clone(), site.consumer.layer.bias
        weight = weight.T if family == "gpt2" else weight
        narrow_(twin, scores.argsort()[removed:])
        set_weight_(twin.consumer.layer, weight[:, columns], None if bias is None else bias.clone())
        fed = stream.batches[0]
        assert torch.allclose(outputs(model, fed), outputs(narrowed, fed), atol=1e-5)
    assert found > 0
    assert divergence.measure(0, divergence.entering) == pytest.approx(0, abs=1e-6)
    survey = Survey(scores={site.key: scores}, moments={site.key: statistics.consumer})
    judge = judge_of(divergence, [site], survey, repair, 0.1)
    assert judge({site.key: site.n_units - removed}) == pytest.approx(found, rel=1e-5)
    assert judge({site.key: site.n_units}) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("recipe", ["sensitivity", "split"])
def test_the_search_is_part_of_the_recipe_and_told_in_a_note(recipe):
    model = tiny_model("llama")
    chosen = Recipe.load(recipe, sparsity=0.3, multiple_of=1, samples=16, length=12, candidates=4)
    report = prune_(model, _calibration(model), chosen)
    assert any("plans tried on" in note and "held-out tokens" in note for note in report.notes)
    widths = {(key.split(".")[1], site["kept"]) for key, site in report.sites.items()}
    assert recipe == "sensitivity" or len(widths) == 2


def test_the_same_run_twice_gives_the_same_model():
    states = []
    for _ in range(2):
        model = tiny_model("llama")
        prune_(model, _calibration(model), Recipe.load("sensitivity", sparsity=0.3, multiple_of=1, candidates=5))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_too_little_text_to_hold_anything_out_is_said_with_numbers():
    model = tiny_model("llama")
    with pytest.raises(DataError, match=r"2 calibration sequences leave none to hold out: .* at least 8"):
        prune_(model, _calibration(model, 1), Recipe.load("sensitivity", sparsity=0.3, multiple_of=1))
