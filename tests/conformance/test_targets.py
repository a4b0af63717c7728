"""What must open where: widths that every target accepts, other model types that say more, biases with a slot."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunelm.architectures import ARCHITECTURES
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import BudgetError, RecipeError, UnsupportedModelError
from prunelm.job import plan_counts, prepare_
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites
from prunelm.stock import stock_config
from prunelm.targets import MULTIPLES, accepted_widths, default_multiple, readers_of
from prunelm.testing import TINY, outputs, tiny_model

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
FED = {"input_ids": torch.arange(3, 15)[None]}


def _recipe(**options):
    return Recipe.load("l2", **{"sparsity": 0.3, "multiple_of": 1, **options})


def _pruned(tmp_path, family, recipe, **options):
    model = tiny_model(family, **{**SIZES, **options})
    save(model, prune_(model, NO_TEXT, recipe), tmp_path / "out", prove=False)
    return model, json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "options", "targets", "written"),
    [
        ("llama", {}, ("transformers",), "mistral"),
        ("llama", {"attention_bias": True}, ("transformers",), "granite"),
        ("llama", {"mlp_bias": True}, ("any",), "granite"),
        ("qwen2", {}, ("transformers", "llama.cpp"), "qwen2"),
        ("qwen2", {"hidden_size": 60, "num_attention_heads": 6, "num_key_value_heads": 6}, ("vllm",), "llama"),
        ("qwen2", {}, ("transformers", "vllm"), "granite"),
        ("qwen3", {}, ("any",), "qwen3"),
    ],
)
def test_another_model_type_says_what_the_own_one_cannot(tmp_path, family, options, targets, written):
    options = {"head_dim": 10 if "hidden_size" in options else 8, **options}
    share = 1.2 if written == "llama" else 1.0
    recipe = _recipe(targets=targets, attention_share=share)
    model, config = _pruned(tmp_path, family, recipe, **options)
    assert config["model_type"] == written
    assert (
        config["num_attention_heads"] == model.config.num_attention_heads < {**SIZES, **options}["num_attention_heads"]
    )
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (outputs(opened.eval(), FED) - outputs(model, FED)).abs().max() < 1e-5
    notes = json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"]
    assert any(f"{family} is written as {written}, which computes the same" in note for note in notes) == (
        written != family
    )
    assert any("biases of zero were written" in note for note in notes) == (family == "qwen2" != written)


def test_a_llama_with_biases_keeps_its_factor_of_attention_as_granite(tmp_path):
    _, config = _pruned(tmp_path, "llama", _recipe(), attention_bias=True, head_dim=16)
    assert config["attention_multiplier"] == 16**-0.5
    assert (config["embedding_multiplier"], config["residual_multiplier"], config["logits_scaling"]) == (1, 1, 1)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_width_that_is_accepted_can_be_said_to_every_reader(family):
    model = tiny_model(family, num_hidden_layers=2)
    targets = ("transformers", *ARCHITECTURES[family].readers)
    legal = accepted_widths(model, targets, 2, uneven=False)
    for site in find_sites(model)[:2]:
        for kept in filter(lambda k: legal(site, k), range(1, site.n_units + 1)):
            sizes = site.measures(kept)
            assert sizes["queries" if site.spec.probabilities else "units"] % 2 == 0
            written = stock_config(model.config, site.config_values(kept), readers_of(targets))
            assert written is not None or kept == site.n_units
            if kept < site.n_units and site.spec.probabilities:
                plain = written.num_attention_heads * site.head_dim == written.hidden_size
                readers = ARCHITECTURES[written.model_type].readers
                assert plain or all(readers[name].head_dim for name in readers_of(targets))


@pytest.mark.parametrize("family", sorted(TINY))
def test_llama_cpp_takes_uneven_blocks_where_one_of_its_architectures_does(family):
    reader = ARCHITECTURES[family].readers.get("llama.cpp")
    forms = ARCHITECTURES[family].gguf
    assert (reader is not None and reader.uneven_when is not None) == any(form.per_block for form in forms)
    assert bool(reader and reader.uneven_when) == any(form.per_block and form.fused for form in forms)
    assert reader is not None or not forms


@pytest.mark.parametrize("per_block", [False, True])
def test_heads_and_channels_divide_over_the_devices(per_block):
    allocator = "per-module" if per_block else "uniform"
    model = tiny_model("mistral", **SIZES, intermediate_size=96)
    options = {"allocator": allocator, "per_block": per_block, "targets": ("vllm",), "tensor_parallel": 2}
    job = plan_counts(model, _recipe(sparsity=0.55, **options))
    kept = {site.key: site.measures(job.keeps(site)) for site in job.everything}
    assert all(sizes["kv_heads"] % 2 == 0 for key, sizes in kept.items() if "attention" in key)
    assert all(sizes["units"] % 2 == 0 for key, sizes in kept.items() if "ffn" in key)
    assert any(sizes["kv_heads"] == 2 for key, sizes in kept.items() if "attention" in key)


def test_multiples_hold_on_each_device_and_for_every_target():
    model = tiny_model("mistral", **SIZES, intermediate_size=1024)
    job = plan_counts(model, _recipe(targets=("vllm", "llama.cpp"), multiple_of=0, tensor_parallel=2))
    assert all(job.keeps(site) % 128 == 0 for site in job.sites if site.name == "ffn")
    assert default_multiple(("transformers", "llama.cpp"), 10**9) == 256
    assert default_multiple(("any",), 10**9) == default_multiple(tuple(MULTIPLES), 10**9)


def test_devices_that_heads_do_not_divide_over_must_be_paid_for():
    three = tiny_model("mistral", hidden_size=48, num_hidden_layers=3, intermediate_size=96)
    job = plan_counts(three, _recipe(targets=("vllm",), tensor_parallel=2))
    assert {job.keeps(site) for site in job.sites if site.name == "attention"} == {2}
    with pytest.raises(BudgetError, match=r"vllm on 2 devices: .* must go before heads and channels divide evenly"):
        plan_counts(three, _recipe(sparsity=0.05, targets=("vllm",), tensor_parallel=2))
    where = r"attention of blocks 0 to 2 keeps 3 \(nearest that would do: 1, 2\)"
    with pytest.raises(BudgetError, match=f"vllm on 2 devices cannot hold this plan: {where}"):
        plan_counts(three, _recipe(sites=("ffn",), targets=("vllm",), tensor_parallel=2))
    llama = tiny_model("llama", hidden_size=48, num_hidden_layers=3, intermediate_size=96)
    with pytest.raises(BudgetError, match=where):
        plan_counts(llama, _recipe(sites=("ffn",), targets=("vllm",), tensor_parallel=2))
    with pytest.raises(BudgetError, match="attention of block 0 keeps 3"):
        plan_counts(three, _recipe(blocks="1:", targets=("vllm",), tensor_parallel=2, allocator="per-module",
                                   per_block=True))  # fmt: skip


def test_repairs_get_a_bias_only_where_every_target_has_one():
    for targets, added in ((("transformers",), True), (("transformers", "vllm"), False), (("llama.cpp",), False)):
        model = tiny_model("qwen3", **SIZES)
        job = prepare_(model, _recipe(bias=True, targets=targets))
        assert (bias_of(find_sites(model)[0].consumer.layer) is not None) == added
        assert bool(job.added) == model.config.attention_bias == added
        assert any("has no bias for attention of qwen3" in note for note in job.notes) == (not added)


def test_a_bias_of_qwen3_opens_with_plain_transformers(tmp_path):
    model, config = _pruned(tmp_path, "qwen3", _recipe(bias=True))
    assert config["attention_bias"]
    assert bias_of(find_sites(model)[0].consumer.layer) is not None


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("gemma2", {"targets": ("llama.cpp",), "per_block": True}, r"llama\.cpp opens no gemma2 models .*--uniform"),
        ("llama", {"targets": ("any",), "per_block": True}, r"do not open everywhere: .*--for transformers,vllm,llama"),
        ("opt", {"targets": ("llama.cpp",)}, r"opt is not known to open in llama\.cpp, only in transformers, vllm"),
        ("gpt2", {"targets": ("llama.cpp",)}, r"llama\.cpp takes the widths of gpt2 from its hidden size"),
    ],
)
def test_what_a_target_cannot_open_is_refused_before_anything_is_read(family, options, says):
    with pytest.raises((RecipeError, UnsupportedModelError), match=says):
        plan_counts(tiny_model(family), _recipe(**options))


def test_uneven_qwen3_opens_in_llama_cpp_only_with_tied_embeddings():
    options = {"targets": ("llama.cpp",), "per_block": True, "allocator": "per-module"}
    assert plan_counts(tiny_model("qwen3", **SIZES), _recipe(**options)).counts
    with pytest.raises(RecipeError, match=r"only qwen3 models with tie_word_embeddings=True whose blocks differ"):
        plan_counts(tiny_model("qwen3", **SIZES, tie_word_embeddings=False), _recipe(**options))


def test_sublayers_stay_where_programs_cannot_do_without(tmp_path):
    model = tiny_model("llama", **SIZES)
    for targets, least in ((("transformers",), 0), (("vllm",), 1)):
        job = plan_counts(model, _recipe(targets=targets, per_block=True, allocator="per-module", min_units=0))
        site = job.sites[-1]
        assert site.n_units - job.budget.options(site)[-1] == least


def test_hidden_channels_with_uneven_blocks_are_refused_for_other_programs():
    recipe = _recipe(targets=("vllm",), per_block=True, allocator="per-module", hidden=0.25)
    with pytest.raises(RecipeError, match="no hidden channels can go where blocks differ in width and vllm"):
        prepare_(tiny_model("llama", **SIZES), recipe, narrow_hidden=lambda *_: None)


def test_a_program_that_is_not_known_is_named():
    with pytest.raises(RecipeError, match=r"must be of .*llama\.cpp, any, got 'vlm'\. Did you mean 'vllm'\?"):
        _recipe(targets=("vlm",))
    with pytest.raises(RecipeError, match="tensor_parallel must be at least 1, got 0"):
        _recipe(tensor_parallel=0)


def test_the_command_says_it_before_it_starts(cli, tiny_folder, tmp_path):
    model = tiny_folder("qwen2", hidden_size=64, num_attention_heads=8, num_key_value_heads=4, num_hidden_layers=3)
    size = ("--sparsity", "0.3", "--recipe", "l2", "--multiple-of", "1", "--for", "transformers,vllm")
    dry = cli("prune", model, tmp_path / "out", *size, "--dry-run")
    ran = cli("prune", model, tmp_path / "out", *size)
    line = next(line for line in dry.err.splitlines() if "qwen2 is written as" in line)
    assert "vllm takes the size of a head from hidden size and number of heads" in line
    assert ran.err.splitlines()[1] == line
    assert ran.err.count("is written as") == 1
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["recipe"]["targets"] == ["transformers", "vllm"]
