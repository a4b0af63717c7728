import gc
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import prunelm
from prunelm import allocation, natural_gradient
from prunelm.allocation import allocated, look_at
from prunelm.data import Batches
from prunelm.errors import BudgetError
from prunelm.family import prune_family
from prunelm.job import prepare_
from prunelm.plan import Nested
from prunelm.progress import silent
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.stream import BlockStream
from prunelm.testing import outputs, tiny_inputs, tiny_model

SIZES = (0.4, 0.1, 0.25)


def _calibration(family):
    model = tiny_model(family)
    found = [tiny_inputs(model, seed=seed) for seed in range(12)]
    return Batches(batches=found, facts={"tokens": 12 * 24, "sequences": 24})


def _family(family, recipe, sizes=SIZES, **changes):
    chosen = Recipe.load(recipe, **{"multiple_of": 1, "samples": 24, "length": 12, **changes})
    return list(prune_family(lambda: tiny_model(family, num_hidden_layers=3), _calibration(family), chosen, sizes))


@pytest.mark.parametrize(
    "recipe", ["best", "best-uniform", "sensitivity", "obs", "flap", "wanda-sp", "goa-budget", "l2"]
)
def test_the_sizes_of_a_family_are_nested(recipe):
    found = _family("llama", recipe, sites=("attention", "ffn"))
    assert [report.recipe.sparsity for _, report in found] == sorted(SIZES)
    kept = [report.plan.kept for _, report in found]
    for larger, smaller in pairwise(kept):
        assert all(set(smaller[key].tolist()) <= set(larger[key].tolist()) for key in larger)
    total = [sum(len(units) for units in plan.values()) for plan in kept]
    assert total == sorted(total, reverse=True)
    for model, report in found:
        assert {site.key: site.n_units for site in find_sites(model)} == {k: s["kept"] for k, s in report.sites.items()}
        assert report.recipe.sparsity - 0.05 < report.sparsity_of_blocks <= report.recipe.sparsity
        assert outputs(model, tiny_inputs(model)).isfinite().all()


@pytest.mark.parametrize("recipe", ["obs", "goa-budget", "liar", "flap", "taylor-first"])
def test_the_largest_model_of_a_family_is_that_of_a_prune_alone(recipe):
    found, (alone, report) = _family("llama", recipe), _family("llama", recipe, sizes=(min(SIZES),))[0]
    chosen = Recipe.load(recipe, multiple_of=1, samples=24, length=12, sparsity=min(SIZES))
    model = tiny_model("llama", num_hidden_layers=3)
    assert _kept(report) == _kept(prune_(model, _calibration("llama"), chosen)) == _kept(found[0][1])
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, alone.state_dict()[name])
        assert torch.equal(weight, found[0][0].state_dict()[name])


@pytest.mark.parametrize(("recipe", "surveyed"), [("obs", 0), ("goa-budget", 0), ("taylor-first", 1), ("best", 1)])
def test_the_dense_model_is_looked_at_only_where_a_size_reads_what_was_seen(monkeypatch, recipe, surveyed):
    seen, looks = allocation.survey, []
    monkeypatch.setattr(allocation, "survey", lambda *args, **known: (looks.append(args), seen(*args, **known))[1])
    _family("llama", recipe)
    assert len(looks) == surveyed


def test_a_survey_runs_no_block_behind_the_last_that_something_is_measured_in(monkeypatch):
    run, ran = BlockStream.run, []
    monkeypatch.setattr(BlockStream, "run", lambda self, i, *rest: (ran.append(i), run(self, i, *rest))[1])
    for recipe, blocks in (("taylor-first", set()), ("l2", set()), ("wanda-sp", {0, 1, 2})):
        chosen = Recipe.load(recipe, multiple_of=1, samples=24, length=12, sparsity=0.3)
        model = tiny_model("llama", num_hidden_layers=3)
        ran.clear()
        look_at(model, _calibration("llama"), chosen, prepare_(model, chosen), silent)
        assert set(ran) == blocks, recipe


def test_the_dense_model_answers_once_for_the_steps_of_all_sizes(monkeypatch):
    asked, told = natural_gradient.aim_of, []
    monkeypatch.setattr("prunelm.family.aim_of", lambda *args: (told.append(args), asked(*args))[1])
    monkeypatch.setattr("prunelm.pruning.aim_of", lambda *_: pytest.fail("asked again"))
    shared = _family("llama", "obs", natural_steps=2)
    monkeypatch.undo()
    again = _family("llama", "obs", sizes=(min(SIZES),), natural_steps=2)
    model = tiny_model("llama", num_hidden_layers=3)
    chosen = Recipe.load("obs", multiple_of=1, samples=24, length=12, sparsity=min(SIZES), natural_steps=2)
    report = prune_(model, _calibration("llama"), chosen)
    assert len(told) == 1
    assert any("natural gradient: divergence" in note for note in report.notes)
    for (pruned, found), size in zip(shared, sorted(SIZES), strict=True):
        assert sum(note.startswith("natural gradient: divergence") for note in found.notes) == 1, size
        assert outputs(pruned, tiny_inputs(pruned)).isfinite().all()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again[0][0].state_dict()[name])
        assert torch.equal(weight, shared[0][0].state_dict()[name])


@pytest.mark.parametrize("recipe", ["best", "best-uniform", "obs", "taylor-first"])
def test_the_dense_model_has_gone_when_sizes_are_pruned(recipe):
    dense = []

    def load():
        model = tiny_model("llama", num_hidden_layers=3)
        dense.extend(map(weakref.ref, (model, next(model.model.layers[0].parameters()))))
        return model

    chosen = Recipe.load(recipe, multiple_of=1, samples=24, length=12)
    for _ in prune_family(load, _calibration("llama"), chosen, SIZES):
        gc.collect()
        assert dense[0]() is dense[1]() is None


def test_units_are_chosen_behind_the_pruned_prefix_among_those_of_the_size_before():
    chosen = Recipe.load("obs", multiple_of=1, samples=24, length=12, sparsity=0.4)
    before, after = (report.plan.kept for _, report in _family("llama", "obs", sizes=(0.1, 0.4)))
    model = tiny_model("llama", num_hidden_layers=3)
    alone = prune_(model, _calibration("llama"), chosen, nested=Nested(among=before)).plan.kept
    assert {key: units.tolist() for key, units in alone.items()} == {
        key: units.tolist() for key, units in after.items()
    }
    free = prune_(tiny_model("llama", num_hidden_layers=3), _calibration("llama"), chosen).plan.kept
    assert any(not torch.equal(free[key], after[key]) for key in free)


@pytest.mark.parametrize(("recipe", "how"), [("best", "the prices it found"), ("best-uniform", "the damage expected")])
def test_the_middle_size_is_what_the_search_found(recipe, how):
    (alone,) = _family("llama", recipe, sizes=(0.25,))
    found = _family("llama", recipe)
    assert _kept(found[1][1]) == _kept(alone[1])
    for (_, report), other in zip(found, (True, False, True), strict=True):
        assert sum("plans tried on" in note for note in report.notes) == 1
        assert any(f"that search was for another size: widths here are by {how}" in n for n in report.notes) is other


def test_where_a_smaller_size_does_not_fit_into_the_plan_found_prices_plan_all(monkeypatch):
    refused = []

    def refuse(job, recipe, outlook):
        if job.budget.ceiling:
            refused.append(recipe.sparsity)
            raise BudgetError("no plan within")
        return allocated(job, recipe, outlook)

    monkeypatch.setattr("prunelm.family.allocated", refuse)
    found = _family("llama", "best", sites=("attention", "ffn"))
    assert refused == [0.1]
    for larger, smaller in pairwise(report.plan.kept for _, report in found):
        assert all(set(smaller[key].tolist()) <= set(larger[key].tolist()) for key in larger)


def test_exchanges_that_a_family_leaves_out_are_told():
    for _, report in _family("llama", "obs", sizes=(0.2, 0.3), exchanges=4):
        assert any("no units were exchanged" in note for note in report.notes)
    model = tiny_model("llama")
    alone = prune_(model, _calibration("llama"), Recipe.load("obs", multiple_of=1, sparsity=0.3, exchanges=4))
    assert not any("no units were exchanged" in note for note in alone.notes)
    assert any("exchanged" in site for site in alone.sites.values())


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_families_of_other_architectures(family):
    found = list(
        prune_family(
            lambda: tiny_model(family),
            _calibration(family),
            Recipe.load("best", multiple_of=1, sites=("attention", "ffn")),
            [0.2, 0.3],
        )
    )
    assert len(found) == 2


def test_one_size_alone_is_as_good_as_in_a_family_of_one():
    (alone,) = _family("llama", "obs", sizes=(0.25,))
    assert alone[1].sparsity_of_blocks <= 0.25


def test_a_size_out_of_reach_is_refused_before_anything_is_pruned():
    loads = []

    def load():
        loads.append(tiny_model("llama"))
        return loads[-1]

    sizes = prune_family(load, _calibration("llama"), Recipe.load("sensitivity", multiple_of=1), [0.2, 0.995])
    with pytest.raises(BudgetError, match="at most"):
        next(sizes)
    assert len(loads) == 1
    assert all(torch.equal(a, b) for a, b in zip(loads[0].parameters(), tiny_model("llama").parameters(), strict=True))


def test_two_sizes_need_two_folders(tiny_folder, text_file, tmp_path):
    with pytest.raises(BudgetError, match=r"two sparsities would both be written to .*out/0\.2: let them differ"):
        prunelm.prune_sizes(tiny_folder("llama"), tmp_path / "out", [0.2, 0.2000001], recipe="l2", text=text_file)
    assert not list(tmp_path.iterdir())


def test_covariances_are_of_their_own_text_in_a_family_too():
    changes = {"multiple_of": 1, "criterion": "second-moment", "reconstruction": "none", "allocator": "uniform"}
    recipe = Recipe.load("obs", sites=("ffn",), **changes)
    recipe = replace(recipe, ffn=replace(recipe.ffn, options={"form": "gaussian"}))
    other = replace(_calibration("llama"), batches=[tiny_inputs(tiny_model("llama"), seed=seed) for seed in (97, 98)])
    plain, apart = (
        next(prune_family(lambda: tiny_model("llama"), _calibration("llama"), recipe, [0.3], refit=refit))[1]
        for refit in (None, other)
    )
    alone = prune_(
        tiny_model("llama"), _calibration("llama"), replace(recipe, sparsity=0.3, order="one-shot"), refit=other
    )
    assert _kept(apart) == _kept(alone)
    assert _kept(apart) != _kept(plain)


def _kept(report):
    return {key: units.tolist() for key, units in report.plan.kept.items()}
