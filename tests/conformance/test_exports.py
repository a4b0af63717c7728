"""Folders for other programs: nemotron-nas read by its own rules, zeros up to the widest block, ONNX in onnxruntime."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM

import prunelm
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.decilm_export import width_of
from prunelm.errors import CheckpointError, UnsupportedModelError
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites, narrow_
from prunelm.testing import TINY, outputs, tiny_model

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
FED = {"input_ids": torch.arange(3, 15)[None]}
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 3}
DERIVED = {"gpt2", "opt", "gpt_neox", "bert"}


def written(folder, family, lost, **options):
    """A per-block folder whose blocks have lost so many first units of each site, and the model in memory."""
    sizes = {k: v for k, v in SIZES.items() if family not in DERIVED or k != "num_key_value_heads"}
    model = tiny_model(family, **{**sizes, **({"word_embed_proj_dim": 64} if family == "opt" else {}), **options})
    recipe = Recipe.load("random", sparsity=0.05, multiple_of=1, allocator="per-module", per_block=True, min_units=0)
    report = prune_(model, NO_TEXT, recipe)
    for key, count in lost.items():
        site = next(site for site in find_sites(model) if site.key == key)
        narrow_(site, torch.arange(min(count, site.n_units), site.n_units))
    save(model, report, folder, prove=False)
    return model


def decilm(folder):
    """What readers of nemotron-nas build from a folder, in their own words."""
    raw = json.loads((folder / "config.json").read_text())
    hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
    config = GraniteConfig(  # Llama without its rule on head counts
        attention_multiplier=raw["head_dim"] ** -0.5,
        **{k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "block_configs", "num_key_value_heads")},
        num_key_value_heads=heads,
    )
    model = GraniteForCausalLM(config).eval()
    for layer, block in zip(model.model.layers, raw["block_configs"], strict=True):
        if block["attention"]["no_op"]:
            layer.input_layernorm = torch.nn.Identity()
            layer.self_attn = SimpleLayer((0.0, None))
        else:
            kv_heads = heads // block["attention"]["n_heads_in_group"]
            layer.self_attn.num_key_value_groups = heads // kv_heads
            for name in ("k_proj", "v_proj"):
                bias = raw["attention_bias"]
                setattr(layer.self_attn, name, torch.nn.Linear(hidden, kv_heads * raw["head_dim"], bias=bias))
        if block["ffn"]["no_op"]:
            layer.post_attention_layernorm = torch.nn.Identity()
            layer.mlp = SimpleLayer(0.0)
        else:
            width = width_of(block, hidden)
            layer.mlp.gate_proj, layer.mlp.up_proj = (
                torch.nn.Linear(hidden, width, bias=raw["mlp_bias"]) for _ in range(2)
            )
            layer.mlp.down_proj = torch.nn.Linear(width, hidden, bias=raw["mlp_bias"])
    weights = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    return model


class SimpleLayer(torch.nn.Module):
    """A sublayer that gives nothing."""

    def __init__(self, gives):
        super().__init__()
        self.gives = gives

    def forward(self, *_args, **_kwargs):
        return self.gives


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("qwen2", {}),
        ("mistral", {"sliding_window": 16}),
    ],
)
def test_nemotron_nas_readers_compute_the_same(tmp_path, family, options):
    model = written(tmp_path / "model", family, {"0.ffn": 7, "1.ffn": 60, "2.ffn": 20}, intermediate_size=96, **options)
    even_(model, tmp_path)
    found = prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
    assert (outputs(decilm(tmp_path / "out"), FED) - outputs(model, FED)).abs().max() < 1e-5
    assert any("are no multiple of 256" in note for note in found.notes)
    assert any("context ends at 16 tokens" in note for note in found.notes) == (family == "mistral")
    assert (tmp_path / "out" / "configuration_decilm.py").is_file()


def even_(model, tmp_path):
    """Give all blocks the same number of heads, in memory and in the folder."""
    fewest = min(site.n_units for site in find_sites(model) if site.name == "attention")
    for i in range(3):
        site = next(site for site in find_sites(model) if site.key == f"{i}.attention")
        narrow_(site, torch.arange(fewest))
    save(model, _report(), tmp_path / "model", prove=False, force=True)


def _report():
    small = tiny_model("llama")
    recipe = Recipe.load("random", sparsity=0.3, multiple_of=1, allocator="per-module", per_block=True)
    return prune_(small, NO_TEXT, recipe)


def test_widths_that_all_readers_share_are_said_by_a_factor(tmp_path):
    model = written(tmp_path / "model", "llama", {}, intermediate_size=1024)
    for i, keep in enumerate((768, 512, 256)):
        narrow_(next(site for site in find_sites(model) if site.key == f"{i}.ffn"), torch.arange(keep))
    even_(model, tmp_path)
    found = prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
    blocks = json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"]
    assert [width_of(block, 64) for block in blocks] == [768, 512, 256]
    assert all("ffn_mult" in block["ffn"] for block in blocks)
    assert not any("multiple of 256" in note for note in found.notes)
    assert (outputs(decilm(tmp_path / "out"), FED) - outputs(model, FED)).abs().max() < 1e-5


def test_the_factor_gives_every_width_back():
    for hidden in (64, 576, 960, 2048, 3072, 4096, 5120, 8192):
        for width in range(256, 4 * hidden + 256, 256):
            assert width_of({"ffn": {"no_op": False, "ffn_mult": 1.5 * width / hidden}}, hidden) == width


def test_missing_sublayers_are_no_ops(tmp_path):
    model = written(tmp_path / "model", "llama", {"1.attention": 8, "2.ffn": 200}, intermediate_size=96)
    for i in (0, 2):
        narrow_(next(site for site in find_sites(model) if site.key == f"{i}.attention"), torch.arange(3))
    save(model, _report(), tmp_path / "model", prove=False, force=True)
    prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
    blocks = json.loads((tmp_path / "out" / "config.json").read_text())["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True]
    assert (outputs(decilm(tmp_path / "out"), FED) - outputs(model, FED)).abs().max() < 1e-5


def test_the_config_of_nemotron_nas_has_attributes(tmp_path):
    tiny_model("llama", **SIZES).save_pretrained(tmp_path / "model")
    prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert config.block_configs[1].attention.n_heads_in_group == 2
    assert config.block_configs[1].ffn.no_op is False
    assert not hasattr(config.block_configs[1].ffn, "ffn_mult")
    config.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["block_configs"][1]["ffn"]["intermediate_size"] == 40


@pytest.mark.parametrize(
    ("family", "format", "says"),
    [
        ("llama", "nemotron-nas", r"one number of query heads for all blocks, here are 4 in block 1, .*--uniform"),
        ("gemma2", "nemotron-nas", r"computes what causal Llama, Mistral and Qwen2 do, not gemma2\. .*padded"),
    ],
)
def test_what_a_format_cannot_hold_is_refused_with_its_blocks(tmp_path, family, format, says):
    written(tmp_path / "model", family, {"1.attention": 2})
    with pytest.raises(UnsupportedModelError, match=says):
        prunelm.export(tmp_path / "model", tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_an_activation_that_readers_do_not_compute_is_refused(tmp_path):
    tiny_model("llama", hidden_act="gelu").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"computes SiLU in the FFN, and this model says 'gelu'"):
        prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")


@pytest.mark.parametrize("family", sorted(TINY))
def test_zeros_up_to_the_widest_block_compute_the_same_in_stock_classes(tmp_path, family, monkeypatch):
    monkeypatch.setattr("prunelm.padding.prove_folder", lambda *_: 0.0)
    model = written(tmp_path / "model", family, {"0.attention": 1, "1.attention": 2, "0.ffn": 3, "2.ffn": 9})
    found = prunelm.export(tmp_path / "model", tmp_path / "out", format="padded")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    classes = __import__("transformers")
    opened, info = getattr(classes, config["architectures"][0]).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
    assert (outputs(opened.eval(), FED) - outputs(model, FED)).abs().max() < 1e-5
    before, after = model.num_parameters(), opened.num_parameters()
    assert any(f"zeros bring {before:,} parameters to {after:,}" in note for note in found.notes)
    assert before < after
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert facts["loader"] == "transformers"
    assert config["torch_dtype"] == "float32"


def test_zeros_go_between_the_query_heads_of_a_group_too(tmp_path, monkeypatch):
    monkeypatch.setattr("prunelm.padding.prove_folder", lambda *_: 0.0)
    model = tiny_model("llama", **{**SIZES, "num_key_value_heads": 2})
    recipe = Recipe.load("random", sparsity=0.1, multiple_of=1, allocator="per-module", per_block=True, unit="query")
    report = prune_(model, NO_TEXT, recipe)
    for key, keep in (("0.attention", [0, 2, 3, 4, 5, 7]), ("1.attention", [1, 6])):
        site = next(site for site in find_sites(model, "query") if site.key == key)
        narrow_(site, torch.tensor([i for i in keep if i < site.n_units]))
    save(model, report, tmp_path / "model", prove=False)
    prunelm.export(tmp_path / "model", tmp_path / "out", format="padded")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (outputs(opened, FED) - outputs(model, FED)).abs().max() < 1e-5


def test_nothing_to_pad_is_said(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="there is nothing to pad"):
        prunelm.export(tmp_path / "model", tmp_path / "out", format="padded")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {},
            r"one of gguf, nemotron-nas, onnx, padded, torchao-int8, none is given\. A name that ends in \.gguf",
        ),
        ({"format": "onx"}, r"got 'onx'\. Did you mean 'onnx'\?"),
        ({"format": "padded", "type": "f16"}, r"--type is for \.gguf files"),
    ],
)
def test_bad_input(tmp_path, options, says):
    with pytest.raises(CheckpointError, match=says):
        prunelm.export(tmp_path, tmp_path / "out", **options)


def test_the_command(cli, per_block, tmp_path):
    ran = cli("export", per_block, tmp_path / "out", "--format", "padded")
    assert ran.code == 0, ran
    assert "loaded in a fresh process, same logits" in ran.out
    assert "are given back" in ran.err
    again = cli("export", per_block, tmp_path / "out", "--format", "padded")
    assert "exists" in again.err


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "bert"])
def test_onnxruntime_computes_the_same(tmp_path, family):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = {"sliding_window": None} if family == "mistral" else {}
    model = written(tmp_path / "model", family, {"0.attention": 1, "1.attention": 2, "2.ffn": 9}, **options)
    found = prunelm.export(tmp_path / "model", tmp_path / "out", format="onnx")
    assert "run in onnxruntime, largest difference" in found.proof
    names = {file.name for file in (tmp_path / "out").glob("*.onnx")}
    assert names == ({"model.onnx"} if family == "bert" else {"prefill.onnx", "decode.onnx"})
    if model.can_generate():
        length = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
        tokens = model.generate(**FED, attention_mask=torch.ones_like(FED["input_ids"]), **length)
        assert greedy(tmp_path / "out", FED["input_ids"]) == tokens[0, 12:].tolist()


def test_a_sliding_window_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    tiny_model("mistral", sliding_window=8).save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"looks back 8 tokens only"):
        prunelm.export(tmp_path / "model", tmp_path / "out", format="onnx")


def greedy(folder, ids):
    """24 tokens by the two graphs, the end-of-text token never taken."""
    from onnxruntime import InferenceSession

    prefill, decode = (InferenceSession(folder / f"{name}.onnx") for name in ("prefill", "decode"))
    places = torch.arange(ids.shape[1])[None]
    logits, *cache = prefill.run(None, {"input_ids": ids.numpy(), "position_ids": places.numpy()})
    found = []
    for place in range(ids.shape[1], ids.shape[1] + 24):
        logits[0, -1, 2] = -float("inf")
        found.append(int(logits[0, -1].argmax()))
        fed = {"input_ids": [[found[-1]]], "position_ids": [[place]]}
        rest = [entry.name for entry in decode.get_inputs() if entry.name not in fed]
        logits, *cache = decode.run(None, fed | dict(zip(rest, cache, strict=True)))
    return found


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("prunelm.onnx_export.importlib.util.find_spec", lambda _name: None)
    with pytest.raises(CheckpointError, match=r"ONNX needs onnx, onnxscript, .*pip install 'prunelm\[onnx\]'"):
        prunelm.export(tmp_path, tmp_path / "out", format="onnx")


def test_a_bias_that_a_missing_sublayer_gives_is_not_dropped(tmp_path):
    model = written(tmp_path / "model", "llama", {"1.ffn": 200}, intermediate_size=96, mlp_bias=True)
    even_(model, tmp_path)
    assert bias_of(model.model.layers[1].mlp.down_proj).abs().max() > 0
    with pytest.raises(UnsupportedModelError, match=r"1\.ffn has no units but a bias"):
        prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
