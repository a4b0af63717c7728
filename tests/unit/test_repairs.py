import json

import pytest
import torch

from prunelm.biases import add_biases_, missing_biases, remove_biases_
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import BudgetError
from prunelm.job import prepare_
from prunelm.loading import load
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites
from prunelm.testing import outputs, tiny_inputs, tiny_model

FAMILIES = ["llama", "gpt2", "bert", "phi3", "gpt_neox", "gemma3_text"]


def _calibration(model, batches=8, padded=False):
    found = [tiny_inputs(model, seed=seed, padded=padded) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches})


def _recipe(name="obs", **overrides):
    return Recipe.load(name, **{"sparsity": 0.3, "multiple_of": 1, "samples": 16, "length": 12, **overrides})


def _shift(model, reference):
    fed = tiny_inputs(reference, seed=99)
    return float((outputs(model, fed) - outputs(reference, fed)).square().mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_brings_the_model_nearer_to_the_dense_one(family):
    shifts = {}
    for name in ("none", "least-squares"):
        model = tiny_model(family)
        held_out = 0.0 if name == "none" else 0.125
        prune_(model, _calibration(model, 40), _recipe(reconstruction=name, sparsity=0.28, held_out=held_out))
        shifts[name] = _shift(model, tiny_model(family))
    assert shifts["least-squares"] < shifts["none"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe", ["sensitivity", "flap"])
def test_allocating_recipes_meet_their_budget(family, recipe):
    model = tiny_model(family)
    report = prune_(model, _calibration(model), _recipe(recipe))
    assert 0.3 - 400 / report.prunable < report.sparsity_of_blocks <= 0.3
    assert {site.key: site.n_units for site in find_sites(model)} == {k: s["kept"] for k, s in report.sites.items()}
    json.dumps(report.sites)
    assert outputs(model, tiny_inputs(model)).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_exchanges_are_made_where_held_out_tokens_like_them(family):
    """From random units, so that there is something to win."""
    kept, shifts = [], []
    for exchanges in (0, 20):
        model = tiny_model(family)
        changes = {"criterion": "random", "exchanges": exchanges, "held_out": 0.25}
        report = prune_(model, _calibration(model, 40), _recipe(**changes))
        kept.append({key: len(units) for key, units in report.plan.kept.items()})
        shifts.append(_shift(model, tiny_model(family)))
        made = [site.get("exchanged", 0) for site in report.sites.values()]
        assert (sum(made) > 0) == (exchanges > 0)
        assert max(made) <= exchanges
    assert kept[0] == kept[1]
    assert shifts[1] < shifts[0]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_share_of_dense_targets_is_what_the_output_likes(family):
    model = tiny_model(family, num_hidden_layers=3)
    report = prune_(model, _calibration(model, 40), _recipe(choose_share=True, price_tokens=48))
    chosen = [site for site in report.sites.values() if "dense_share" in site]
    assert len(chosen) == sum(site["kept"] < site["units"] for site in report.sites.values()) - 1
    for site in chosen:
        assert set(site["divergences"]) == {0.0, 0.25, 0.5, 1.0}
        assert site["divergences"][site["dense_share"]] == min(site["divergences"].values())
    assert len({tuple(site["divergences"].values()) for site in chosen}) == len(chosen)
    json.dumps(report.sites)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_repair_reports_what_it_was_chosen_from(family):
    model = tiny_model(family)
    report = prune_(model, _calibration(model), _recipe(ridge=0.1, held_out=0.25))
    for site in report.sites.values():
        if site["kept"] < site["units"]:
            errors = site["held_out_errors"]
            assert set(errors) == {"least-squares", "none", "bias"}
            assert errors[site["repair"]] == min(errors.values())


def test_a_dense_target_needs_the_dense_stream_and_changes_the_result():
    weights = []
    for share in (0.0, 0.5):
        model = tiny_model("llama")
        prune_(model, _calibration(model, 16), _recipe(dense_share=share))
        weights.append(model.state_dict()["model.layers.1.mlp.down_proj.weight"])
    assert weights[0].shape == weights[1].shape
    assert not torch.allclose(weights[0], weights[1])


def test_padding_enters_no_repair():
    results = []
    for filler in (0, 50):
        model = tiny_model("bert")
        calibration = _calibration(model, padded=True)
        for batch in calibration.batches:
            batch["input_ids"][1, -4:] = filler
        prune_(model, calibration, _recipe("sensitivity"))
        results.append(model.state_dict())
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-4) for name in results[0])


@pytest.mark.parametrize(("recipe", "loader"), [("obs", "transformers"), ("flap", "prunelm")])
def test_added_biases_are_written_and_read_again(recipe, loader, tmp_path):
    model = tiny_model("llama")
    report = prune_(model, _calibration(model), _recipe(recipe, bias=True, held_out=0.125))
    assert any("bias parameters were added (attention_bias, mlp_bias)" in note for note in report.notes)
    for site in find_sites(model):
        repaired = report.sites[site.key].get("repair", "none") != "none"
        assert bool(bias_of(site.consumer.layer).abs().sum() > 0) == repaired
    facts = save(model, report, tmp_path / "out")
    assert facts["loader"] == loader
    fed = tiny_inputs(model)
    assert torch.allclose(load(tmp_path / "out")(**fed).logits, model(**fed).logits, atol=1e-5)


def test_adding_biases_changes_no_output_and_can_be_undone():
    model, reference = tiny_model("llama"), tiny_model("llama")
    sites, without = missing_biases(model, ["attention", "ffn"])
    assert not without
    assert add_biases_(model, sites) == sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in reference.parameters()
    )
    assert _shift(model, reference) == 0
    remove_biases_(model, sites)
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert not model.config.mlp_bias


def test_a_budget_out_of_reach_leaves_no_biases_behind():
    model = tiny_model("llama")
    with pytest.raises(BudgetError):
        prune_(model, _calibration(model), _recipe(bias=True, sparsity=0.99))
    assert bias_of(find_sites(model)[0].consumer.layer) is None


def test_families_whose_config_has_no_room_for_a_bias_say_so():
    job = prepare_(tiny_model("mistral"), _recipe(bias=True))
    assert job.notes == ["mistral: its config gives attention and ffn no bias, so repairs there have none"]


@pytest.mark.parametrize("sequences", [1, 2, 7])
def test_few_sequences_judge_too_and_one_alone_is_told(sequences):
    model = tiny_model("llama")
    ids = torch.cat([tiny_inputs(model, seed=seed)["input_ids"] for seed in range(4)])[:sequences]
    few = Batches(batches=[{"input_ids": ids}], facts={"tokens": ids.numel(), "sequences": sequences})
    fit, held = few.split(0.125)
    assert len(held.batches) == (sequences > 1)
    assert torch.equal(torch.cat([fit.batches[0]["input_ids"], *[b["input_ids"] for b in held.batches]]), ids)
    report = prune_(model, few, _recipe(held_out=0.125))
    told = [note for note in report.notes if note.startswith("nothing was held out of 1 calibration sequence: ")]
    assert len(told) == (sequences == 1)


def test_one_sequence_in_eight_is_held_out():
    model = tiny_model("llama")
    fit, held = _calibration(model, 8).split(0.125)
    assert (fit.facts, held.facts) == ({"tokens": 168, "sequences": 14}, {"tokens": 24, "sequences": 2})
    everything = torch.cat([b["input_ids"] for b in _calibration(model, 8).batches])
    parts = [torch.cat([b["input_ids"] for b in part.batches]) for part in (fit, held)]
    assert torch.equal(parts[1], everything[[7, 15]])
    assert torch.equal(parts[0], everything[[i for i in range(16) if i not in (7, 15)]])
