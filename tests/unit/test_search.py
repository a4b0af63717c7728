import itertools
from dataclasses import replace

import pytest
import torch

from prunelm.allocators.uniform import split, uniform_plans
from prunelm.data import Batches
from prunelm.errors import DataError
from prunelm.plan import Budget, prunable
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.rehearsal import Rehearsal
from prunelm.search import pick
from prunelm.sensitivity import Divergence
from prunelm.sites import find_sites, narrow_, set_weight_
from prunelm.stream import BlockStream
from prunelm.testing import made_up_measurements, outputs, site_statistics, tiny_inputs, tiny_model

SITES = find_sites(tiny_model("llama", num_hidden_layers=3))
TOTAL = prunable(SITES)
BUDGET = Budget(target=TOTAL // 3, total=TOTAL)
PRICES = made_up_measurements("split", SITES, BUDGET)[0]


def _calibration(model, batches=8):
    found = [tiny_inputs(model, seed=seed) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches})


def test_equal_widths_are_chosen_by_what_is_measured():
    plans = list(uniform_plans(SITES, BUDGET))
    assert len(plans) > 1
    attention = [counts["0.attention"] for counts, _ in plans]
    assert len(set(attention)) == len(plans)
    found = pick(plans, lambda counts: float(abs(counts["0.attention"] - attention[-1])), target=0, candidates=9)
    assert found.counts == plans[-1][0]
    assert pick(plans, lambda _: 1.0, target=0, candidates=9).counts == plans[0][0]
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
    with Rehearsal([site], {site.key: scores}, {site.key: statistics.consumer}, repair, 0.1) as rehearsal:
        rehearsal.apply({site.key: removed})
        found = divergence.measure(0, divergence.entering)
        columns = site.consumer.keep(scores.argsort()[removed:])
        weight, bias = site.consumer.layer.weight.clone(), site.consumer.layer.bias
        weight = weight.T if family == "gpt2" else weight
        narrow_(twin, scores.argsort()[removed:])
        set_weight_(twin.consumer.layer, weight[:, columns], None if bias is None else bias.clone())
        fed = stream.batches[0]
        assert torch.allclose(outputs(model, fed), outputs(narrowed, fed), atol=1e-5)
        assert found > 0
        rehearsal.apply({site.key: 0})
        assert divergence.measure(0, divergence.entering) == pytest.approx(0, abs=1e-6)
        rehearsal.apply({site.key: removed})
        assert divergence.measure(0, divergence.entering) == pytest.approx(found, rel=1e-5)
        rehearsal.forget()
        rehearsal.apply({site.key: 0})
        assert divergence.measure(0, divergence.entering) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("family", "name"), [("llama", "attention"), ("gpt2", "ffn"), ("bert", "attention")])
def test_one_factorization_gives_what_each_solve_would(family, name):
    model = tiny_model(family)
    site = next(s for s in find_sites(model) if s.name == name)
    scores = torch.rand(site.n_units, generator=torch.Generator().manual_seed(0))
    moments, nested = site_statistics(model, site).consumer, RECONSTRUCTIONS["least-squares"]
    assert nested.nested is not None
    layers = []
    for repair in (nested, replace(nested, nested=None)):
        with Rehearsal([site], {site.key: scores}, {site.key: moments}, repair, 0.1) as rehearsal:
            layers.append([rehearsal.layer(site.key, removed) for removed in range(site.n_units)])
    for (weight, bias), (own, own_bias) in zip(*layers, strict=True):
        assert torch.allclose(weight, own, atol=1e-5)
        assert (bias is None) == (own_bias is None)
        assert bias is None or torch.allclose(bias, own_bias, atol=1e-5)


@pytest.mark.parametrize(("recipe", "changes"), [("best", {}), ("best-uniform", {}), ("sensitivity", {"rounds": 4})])
def test_the_search_is_part_of_the_recipe_and_told_in_a_note(recipe, changes):
    model = tiny_model("llama", num_hidden_layers=3)
    chosen = Recipe.load(recipe, sparsity=0.3, multiple_of=1, samples=16, length=12, candidates=4, **changes)
    report = prune_(model, _calibration(model), chosen)
    assert any("plans tried on" in note and "held-out tokens" in note for note in report.notes)
    widths = {(key.split(".")[1], site["kept"]) for key, site in report.sites.items()}
    assert recipe != "best-uniform" or len(widths) == 2


@pytest.mark.parametrize(
    ("recipe", "judge", "plain"),
    [
        ("best", "prunelm.descent.rehearsed", {"rounds": 0}),
        ("best-uniform", "prunelm.allocation.rehearsed", {"candidates": 1}),
    ],
)
def test_a_search_that_finds_nothing_better_says_so_and_keeps_its_start(recipe, judge, plain, monkeypatch):
    divergences = itertools.count(1.0)
    monkeypatch.setattr(judge, lambda *_: next(divergences))
    chosen = Recipe.load(recipe, sparsity=0.3, multiple_of=1)
    searched, start = (
        prune_(model, _calibration(model), replace(chosen, **changes))
        for model, changes in ((tiny_model("llama", num_hidden_layers=3), c) for c in ({}, plain))
    )
    tried = int(next(divergences)) - 1
    assert tried > 1
    assert any(
        note.startswith(f"{tried} plans tried on") and note.endswith("; none was better than the first")
        for note in searched.notes
    )
    assert all(torch.equal(units, start.plan.kept[key]) for key, units in searched.plan.kept.items())


def test_a_search_with_one_plan_does_not_speak_of_several():
    model = tiny_model("llama")
    report = prune_(model, _calibration(model), Recipe.load("best-uniform", sites=["ffn"], sparsity=0.3, multiple_of=1))
    (note,) = [note for note in report.notes if "search" in note]
    assert note.startswith("the search had no other plan to try than the first: divergence")


def test_the_same_run_twice_gives_the_same_model():
    states = []
    for _ in range(2):
        model = tiny_model("llama")
        prune_(model, _calibration(model), Recipe.load("best", sparsity=0.3, multiple_of=1))
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_too_little_text_to_hold_anything_out_is_said_with_numbers():
    model = tiny_model("llama")
    one = Batches(batches=[{"input_ids": tiny_inputs(model)["input_ids"][:1]}], facts={"tokens": 12, "sequences": 1})
    with pytest.raises(DataError, match=r"1 calibration sequence leaves none to hold out, .* at least 2"):
        prune_(model, one, Recipe.load("sensitivity", sparsity=0.3, multiple_of=1))
