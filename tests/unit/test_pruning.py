import json

import pytest
import torch

from prunelm.data import Batches
from prunelm.errors import BudgetError, CalibrationError, RecipeError
from prunelm.pruning import prune_
from prunelm.recipe import Recipe, Scoring
from prunelm.sites import find_sites, weight_of
from prunelm.testing import outputs, silenced, tiny_inputs, tiny_model

TOKENS = 12


def _calibration(model, batches=4, padded=False):
    found = [tiny_inputs(model, seed=seed, padded=padded) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 2 * TOKENS, "sequences": 2 * batches})


def _recipe(**overrides):
    defaults = {"sparsity": 0.3, "multiple_of": 1, "samples": 8, "length": TOKENS}
    return Recipe.load("goa-budget", **{**defaults, **overrides})


def _weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "bert", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("order", ["sequential", "one-shot"])
def test_pruning_without_refit_only_removes(name, order):
    model, reference = tiny_model(name), tiny_model(name)
    recipe = _recipe(reconstruction="none", order=order, per_block=True, attention_share=1.5)
    report = prune_(model, _calibration(model), recipe)
    sites = find_sites(reference)
    fed = tiny_inputs(reference, seed=9)
    with silenced(sites, report.plan.kept):
        expected = outputs(reference, fed)
    assert (outputs(model, fed) - expected).abs().max() < 1e-4
    assert report.parameters_before - report.parameters_after == report.plan.removed(sites)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "bert"])
def test_two_step_refit_reduces_the_drift_error_of_every_module(name):
    model = tiny_model(name)
    report = prune_(model, _calibration(model, batches=12), _recipe(sparsity=0.2, ridge=0.01))
    refitted = {key: site for key, site in report.sites.items() if "refit_error" in site}
    assert {"1.attention", "1.ffn"} & set(report.sites) <= set(refitted)
    assert refitted
    assert all(site["refit_error"] < site["drift_error"] for site in refitted.values())


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_projections_that_a_norm_follows_are_never_refitted(name):
    model = tiny_model(name)
    before = _weights(model)
    prune_(model, _calibration(model, batches=12), _recipe(sites=("ffn",), ridge=0.01))
    after = _weights(model)
    layer = "model.layers.1.self_attn.{}_proj.weight"
    for projection in ("q", "k"):
        assert torch.equal(after[layer.format(projection)], before[layer.format(projection)])


def test_attention_that_loses_nothing_is_left_alone_without_a_refit_and_refitted_with_one():
    model, refitted = tiny_model("llama"), tiny_model("llama")
    before = _weights(model)
    prune_(model, _calibration(model), _recipe(reconstruction="none", attention_share=0.0))
    prune_(refitted, _calibration(model, batches=12), _recipe(attention_share=0.0, ridge=0.01))
    name = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(_weights(model)[name], before[name])
    if _recipe(attention_share=0.0).sites == ("attention", "ffn"):
        assert torch.equal(_weights(refitted)["model.layers.0.self_attn.o_proj.weight"], before[name.replace("1", "0")])


def test_biases_of_consumers_are_kept_when_nothing_is_refitted():
    model = tiny_model("gpt2")
    before = _weights(model)
    prune_(model, _calibration(model), _recipe(reconstruction="none", per_block=True, attention_share=1.0))
    after = _weights(model)
    for i in (0, 1):
        for layer in ("attn.c_proj.bias", "mlp.c_proj.bias"):
            name = f"transformer.h.{i}.{layer}"
            assert torch.equal(after[name], before[name])


def test_a_refit_of_a_biased_layer_reaches_its_bias():
    model = tiny_model("gpt2")
    before = _weights(model)
    prune_(model, _calibration(model, batches=12), _recipe(ridge=0.01))
    after = _weights(model)
    assert not torch.equal(after["transformer.h.1.mlp.c_proj.bias"], before["transformer.h.1.mlp.c_proj.bias"])


@pytest.mark.parametrize("reconstruction", ["none", "two-step"])
def test_padding_enters_no_statistic(reconstruction):
    results = []
    for filler in (0, 50):
        model = tiny_model("bert")
        calibration = _calibration(model, batches=8, padded=True)
        for batch in calibration.batches:
            batch["input_ids"][1, -4:] = filler
        prune_(model, calibration, _recipe(reconstruction=reconstruction, per_block=True, attention_share=1.0))
        results.append(_weights(model))
    assert all(torch.allclose(results[0][name], results[1][name], atol=1e-4) for name in results[0])


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    models = [tiny_model("llama") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        prune_(model, _calibration(model), _recipe(criterion="random", reconstruction="none", seed=seed))
    first, same, other = (_weights(model) for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_report_is_what_the_weights_say():
    model = tiny_model("llama")
    report = prune_(model, _calibration(model), _recipe(sparsity=0.25))
    assert report.sparsity_of_blocks == pytest.approx(0.25, abs=40 * 3 * 48 * 2 / report.prunable)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    for site in find_sites(model):
        assert report.sites[site.key]["kept"] == site.n_units
    assert model.config.intermediate_size == find_sites(model)[1].n_units
    json.dumps(report.sites)


def test_a_block_range_leaves_other_blocks_alone():
    model = tiny_model("llama", num_hidden_layers=4)
    recipe = _recipe(blocks="1:3", per_block=True, allocator="per-module", sparsity=0.2)
    report = prune_(model, _calibration(model), recipe)
    assert {key.split(".")[0] for key in report.sites} == {"1", "2"}
    whole = [site.n_units for site in find_sites(model) if site.block in {0, 3}]
    assert whole == [3, 40, 3, 40]


def test_a_block_range_that_spares_small_models():
    assert list(_recipe(blocks="4:-2", blocks_from=24).block_range(32)) == list(range(4, 30))
    assert list(_recipe(blocks="4:-2", blocks_from=24).block_range(12)) == list(range(12))


def test_the_printed_rule_decides_heads_and_ffn_pays_the_difference():
    """Heads made alike are all on the printed list; more go than the ratio asks, and the budget still holds."""
    model = tiny_model("gpt2", num_hidden_layers=3)
    with torch.no_grad():
        for block in model.transformer.h:
            for part in (0, 48):
                for head in range(1, 4):
                    start = part + 8 * head
                    block.attn.c_attn.weight[:, start : start + 8] = block.attn.c_attn.weight[:, part : part + 8]
                    block.attn.c_attn.bias[start : start + 8] = block.attn.c_attn.bias[part : part + 8]
    recipe = Recipe.load("goa", sparsity=0.3, multiple_of=1, reconstruction="none", blocks=":")
    recipe = Recipe.from_dict(
        {**recipe.to_dict(), "attention": {"criterion": "head-similarity", "rule": "printed", "tau": 1e-4}}
    )
    report = prune_(model, _calibration(model), recipe)
    assert report.sites["0.attention"]["kept"] == 3
    assert report.plan.kept["0.attention"].tolist() == [3, 4, 5]
    assert 0.3 - 97 / report.prunable < report.sparsity_of_blocks <= 0.3


@pytest.mark.parametrize("tau", [0.05, 0.3])
@pytest.mark.parametrize(("family", "sizes"), [("gpt2", {"num_hidden_layers": 3}), ("llama", {"num_hidden_layers": 4})])
def test_the_printed_rule_keeps_to_the_budget_in_steps_of_several_channels(family, sizes, tau):
    """Where heads on the list are more than the ratio asks, FFNs give back in whole steps what went too far."""
    attention = {"criterion": "head-similarity", "rule": "printed", "tau": tau}
    for sparsity in (0.13, 0.22, 0.31, 0.4):
        model = tiny_model(family, **sizes)
        recipe = Recipe.load("goa", sparsity=sparsity, multiple_of=8, reconstruction="none", blocks=":")
        recipe = Recipe.from_dict({**recipe.to_dict(), "attention": attention})
        step = 8 * next(site.cost for site in find_sites(model) if site.name == "ffn")
        report = prune_(model, _calibration(model), recipe)
        assert sparsity - step / report.prunable < report.sparsity_of_blocks <= sparsity


def test_a_second_prune_of_a_pruned_model():
    model = tiny_model("llama")
    prune_(model, _calibration(model), _recipe(sparsity=0.2))
    prune_(model, _calibration(model), _recipe(sparsity=0.2))
    assert model(**tiny_inputs(model)).logits.isfinite().all()
    per_block = _recipe(sparsity=0.3, per_block=True, allocator="per-module", reconstruction="none")
    prune_(model, _calibration(model), per_block)
    assert model(**tiny_inputs(model)).logits.isfinite().all()


def test_refit_and_scores_can_read_different_tokens():
    model, same = tiny_model("llama"), tiny_model("llama")
    other = Batches(
        batches=[tiny_inputs(model, seed=seed) for seed in range(50, 62)], facts={"tokens": 288, "sequences": 24}
    )
    prune_(model, _calibration(model), _recipe(ridge=0.01), refit=other)
    prune_(same, _calibration(same), _recipe(ridge=0.01))
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(_weights(model)[name][:1], _weights(same)[name][:1])


def test_nothing_is_changed_when_the_budget_cannot_be_met():
    model = tiny_model("llama")
    before = _weights(model)
    with pytest.raises(BudgetError, match="cannot be met by whole units"):
        prune_(model, _calibration(model), _recipe(sparsity=0.99))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_broken_weights_name_their_block():
    model = tiny_model("llama")
    with torch.no_grad():
        weight_of(find_sites(model)[3].producers[0].layer)[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"block 1, 1\.ffn: .* non-finite statistics"):
        prune_(model, _calibration(model), _recipe())


def test_head_similarity_of_an_ffn_is_refused():
    model = tiny_model("llama")
    recipe = Recipe(sparsity=0.3, multiple_of=1, ffn=Scoring(criterion="head-similarity"))
    with pytest.raises(RecipeError, match="compares heads, and ffn has none"):
        prune_(model, _calibration(model), recipe)


def test_no_site_left_is_refused():
    with pytest.raises(BudgetError, match="no site is left to prune"):
        prune_(tiny_model("gpt2"), _calibration(tiny_model("gpt2")), _recipe(sites=("attention",)))
