"""On a GPU the same units go, and the same weights stay, as on the CPU. Run with `pytest -m gpu` where there is one."""

import copy

import pytest
import torch

from prunelm import calibrate, prune, prune_sizes, repair
from prunelm.data import Batches
from prunelm.evaluation import evaluate
from prunelm.pruning import prune_
from prunelm.recipe import Recipe, recipe_names
from prunelm.spreading import gathered, spread
from prunelm.testing import outputs, tiny_inputs, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of CUDA here")]
FAMILIES = ("llama", "qwen3", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "bert")
TOKENS = 24


def _calibration(model, padded=False):
    found = [tiny_inputs(model, seed=seed, padded=padded) for seed in range(40)]
    return Batches(batches=found, facts={"tokens": 40 * TOKENS, "sequences": 80})


def _recipe(name, **overrides):
    small = {"sparsity": 0.3, "multiple_of": 1, "samples": 80, "length": TOKENS, "price_tokens": 96}
    recipe = Recipe.load(name, **{**small, **overrides})
    if recipe.policy is not None:
        policy = {**vars(recipe.policy), "steps": 20, "save_every": 10}
        return Recipe.from_dict({**recipe.to_dict(), "policy": policy})
    return recipe


def _pruned(name, recipe, device, padded=False):
    model = tiny_model(name).to(device)
    report = prune_(model, _calibration(model, padded).to(torch.device(device)), recipe)
    return model.to("cpu"), report


def _check_same(name, recipe, padded=False):
    there, report = _pruned(name, recipe, "cuda", padded)
    here, expected = _pruned(name, recipe, "cpu", padded)
    assert report.device.startswith("cuda")
    assert {k: v.tolist() for k, v in report.plan.kept.items()} == {
        k: v.tolist() for k, v in expected.plan.kept.items()
    }
    fed = tiny_inputs(here, seed=9)
    scale = outputs(here, fed).abs().max()
    assert (outputs(there, fed) - outputs(here, fed)).abs().max() < 1e-3 * scale


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if name != "goa-data-free"])
def test_every_recipe(recipe):
    _check_same("llama", _recipe(recipe))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("recipe", ["obs", "goa-budget"])
def test_every_family(name, recipe):
    _check_same(name, _recipe(recipe, per_block=True), padded=name == "bert")


@pytest.mark.parametrize("recipe", ["obs", "goa-budget", "goa", "flap", "best", "hywia", "osp"])
def test_blocks_on_different_devices(recipe):
    """The first block on the GPU and the second on the CPU, or the other way round: the same units go."""
    expected_model, expected = _pruned("llama", _recipe(recipe), "cpu")
    for first, second in (("cuda:0", "cpu"), ("cpu", "cuda:0")):
        model = tiny_model("llama")
        ends = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
        # accelerate would keep the weights of what is on the CPU away if batches went in on the GPU.
        model = spread(model, {**ends, "model.layers.0": first, "model.layers.1": second})
        report = prune_(model, _calibration(model), _recipe(recipe))
        assert "cuda" in report.device
        assert "cpu" in report.device
        assert {k: v.tolist() for k, v in report.plan.kept.items()} == {
            k: v.tolist() for k, v in expected.plan.kept.items()
        }
        model = gathered(model)
        fed = tiny_inputs(model, seed=9)
        scale = outputs(expected_model, fed).abs().max()
        assert (outputs(model, fed) - outputs(expected_model, fed)).abs().max() < 1e-3 * scale


def test_hidden_channels():
    _check_same("llama", _recipe("liar", hidden=0.25, per_block=True))


def test_exchanges_and_chosen_targets():
    _check_same("llama", _recipe("obs", exchanges=4, choose_share=True, held_out=0.25))


def test_sixteen_bits():
    model = tiny_model("llama").to("cuda", torch.bfloat16)
    report = prune_(model, _calibration(model).to(torch.device("cuda")), _recipe("best"))
    assert torch.isfinite(outputs(model.to("cpu").float(), tiny_inputs(tiny_model("llama")))).all()
    assert report.sparsity_of_blocks == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("recipe", ["goa-budget", "best", "goa-data-free"])
def test_the_whole_way_through_folders(recipe, tiny_folder, text_file, tmp_path):
    options = {"multiple_of": 1, "samples": 64, "length": 64, "dtype": "float32"}
    text = {} if recipe == "goa-data-free" else {"text": text_file}
    report = prune(
        tiny_folder("llama"), tmp_path / "out", recipe=recipe, sparsity=0.3, device="cuda", **text, **options
    )
    assert report.device.startswith("cuda")
    assert (tmp_path / "out" / "config.json").is_file()


def test_families_calibrations_and_repairs(tiny_folder, text_file, tmp_path):
    dense, options = tiny_folder("llama"), {"multiple_of": 1, "samples": 64, "length": 64}
    prune_sizes(dense, tmp_path / "sizes", [0.2, 0.3], recipe="obs", text=text_file, device="cuda", **options)
    calibrate(dense, tmp_path / "seen", recipe="best", text=text_file, device="cuda", sparsity=0.3, **options)
    again = {"samples": 64, "length": 64, "device": "cuda"}
    report = repair(dense, tmp_path / "sizes" / "0.2", tmp_path / "repaired", text=text_file, **again)
    assert report.device.startswith("cuda")


@pytest.mark.parametrize(("name", "model_class"), [("llama", "LlamaForCausalLM"), ("bert", "BertForMaskedLM")])
def test_evaluation(name, model_class, tiny_folder, byte_tokenizer, text_file):
    from prunelm.loading import find_model, load_model

    folder = tiny_folder(name, model_class=model_class)
    found = [
        evaluate(load_model(find_model(folder, device=device)), byte_tokenizer, text_file, length=64)
        for device in ("cpu", "cuda")
    ]
    assert found[1].value == pytest.approx(found[0].value, rel=1e-3)


def test_the_suite(tiny_folder, text_file):
    from prunelm.suite import Setting
    from prunelm.suite.measuring import measure

    setting = Setting(length=64, max_tokens=512)
    parts = ("quality", "positions", "generation", "noise", "speed")
    found = measure(
        tiny_folder("llama"), text_file, against=tiny_folder("llama"), parts=parts, setting=setting, device="cuda"
    )
    assert set(found["parts"]) == set(parts)


def test_twice_the_same_bits_where_that_is_asked_for():
    from prunelm.placement import deterministic

    with deterministic(True):
        first, second = (copy.deepcopy(_pruned("llama", _recipe("obs"), "cuda")[0].state_dict()) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
