"""Every family, uniform and per block: written, opened in one fresh process, and compared with the model in memory."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests import forked

from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.demo import model_file
from prunelm.errors import CheckpointError
from prunelm.loading import find_model, load, load_tokenizer
from prunelm.per_block import modeling_file, stock_names
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites, narrow_
from prunelm.testing import TINY, outputs, tiny_model
from prunelm.workflow.one_size import prune

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
SOME_TEXT = Batches(batches=[{"input_ids": torch.arange(5, 53).view(4, 12)}], facts={"tokens": 48, "sequences": 4})
CASES = [(name, mode) for name in sorted(TINY) for mode in ("uniform", "per-block", "sublayers", "blocks")]
CASES_OF_LAYERS = ("blocks", "sublayers")
OLDEST = ("transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1")
NO_STOCK_HEADS = {"gpt2", "gpt_neox", "opt", "bert"}


def _recipe(mode):
    if mode == "uniform":
        return Recipe.load("l2", sparsity=0.25, multiple_of=4, attention_share=2.0)
    if mode in ("sublayers", "blocks"):
        policy = {"steps": 0, "pool": "all", "layers": mode.removesuffix("s")}
        options = {"per_block": True, "min_units": 0} if mode == "sublayers" else {}
        return Recipe.load("l2", sparsity=0.5, held_out=0.25, loss="kl", policy=policy, **options)
    return Recipe.load("random", sparsity=0.4, multiple_of=1, allocator="per-module", per_block=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The pruned models in memory, and what a fresh process read from their folders."""
    root = tmp_path_factory.mktemp("folders")
    models = {}
    for name, mode in CASES:
        model = tiny_model(name, num_hidden_layers=3, max_position_embeddings=128)
        text = NO_TEXT if mode in ("uniform", "per-block") else SOME_TEXT
        report = prune_(model, text, _recipe(mode))
        if mode == "per-block":
            _unevenly_(model)
        save(model, report, root / f"{name}-{mode}", prove=False)
        models[name, mode] = model
    _run("load_folders.py", root)
    return root, models, load_file(root / "found.safetensors")


def _unevenly_(model):
    """Take one more unit from each site of the last block."""
    for name in ("attention", "ffn"):
        site = next(s for s in find_sites(model) if s.key == f"2.{name}")
        if site.n_units > 1:
            narrow_(site, torch.arange(1, site.n_units))


def _run(script, root, *more, packages=None):
    """Run a script in a fresh process; `packages` is a folder of packages that hides installed ones."""
    words = [str(Path(__file__).parent / script), str(root), *map(str, more)]
    modules = {} if script == "load_folders.py" else {"HF_MODULES_CACHE": str(root.parent / "modules")}
    if packages is None:
        ran = forked.run(*words, environment=modules)
    else:
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = {**own, **modules, "PYTHONPATH": str(packages)}
        command = [sys.executable, *words]
        ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture(scope="module")
def with_code(folders):
    """What a fresh process without PruneLM computed by the code in the per-block folders, and what users saw."""
    root, _, _ = folders
    _run("open_with_code.py", root)
    return load_file(root / "with-code.safetensors"), json.loads((root / "said.json").read_text())


def _same_as_in_memory(found, models, name, mode="per-block", eager=1e-5):
    model, ids = models[name, mode], torch.arange(3, 15)[None]
    expected = outputs(model, {"input_ids": ids})
    for way in ("logits", "eager", "again"):
        gap = (found[f"{name}-{mode}.{way}"] - expected).abs().max()
        assert gap < (eager if way == "eager" else 1e-5), (way, gap)
    if model.can_generate():
        length = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **length)
        for way in ("tokens", "static"):
            assert torch.equal(found[f"{name}-{mode}.{way}"], tokens), way


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_fresh_process_computes_the_same(folders, name, mode):
    _, models, found = folders
    model = models[name, mode]
    ids = torch.arange(3, 15)[None]
    expected = outputs(model, {"input_ids": ids})
    assert (found[f"{name}-{mode}.logits"] - expected).abs().max() < 1e-4
    if model.can_generate():
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(found[f"{name}-{mode}.tokens"], tokens)
    if model.get_output_embeddings() is not None:
        assert bool(found[f"{name}-{mode}.tied"])


@pytest.mark.parametrize("name", sorted(TINY))
def test_uniform_folders_open_with_plain_transformers_and_lose_heads_only_where_configs_can_say_so(folders, name):
    root, _, _ = folders
    facts = json.loads((root / f"{name}-uniform" / "pruning.json").read_text())
    assert facts["loader"] == "transformers"
    lost = {key.split(".")[1] for key, site in facts["sites"].items() if len(site["kept"]) < site["units"]}
    assert ("attention" in lost) == (name not in NO_STOCK_HEADS)
    assert bool(facts["notes"]) == (name in NO_STOCK_HEADS)


@pytest.mark.parametrize("name", sorted(TINY))
def test_folders_without_blocks_open_with_plain_transformers_and_those_without_sublayers_with_ours(folders, name):
    root, models, _ = folders
    blocks, sublayers = (json.loads((root / f"{name}-{mode}" / "pruning.json").read_text()) for mode in CASES_OF_LAYERS)
    assert blocks["loader"] == "transformers"
    assert len(blocks["dropped_blocks"]) == 3 - models[name, "blocks"].config.num_hidden_layers == 1
    assert sublayers["loader"] == "prunelm"
    assert [0] in [list(set(sizes.values())) for sizes in sublayers["widths"].values()]


@pytest.mark.parametrize("name", sorted(TINY))
def test_stock_loaders_refuse_per_block_folders_loudly(folders, name):
    root, _, _ = folders
    config = json.loads((root / f"{name}-per-block" / "config.json").read_text())
    assert config["per_layer_config"]
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        getattr(transformers, TINY[name][1]).from_pretrained(root / f"{name}-per-block")


@pytest.mark.parametrize("mode", ["per-block", "uniform"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_the_folder_computes_the_same_without_prunelm(folders, with_code, name, mode):
    _same_as_in_memory(with_code[0], folders[1], name, mode)


@pytest.mark.parametrize("name", sorted(TINY))
def test_automatic_classes_ask_for_trust_before_they_open_a_per_block_folder(with_code, name):
    said = with_code[1][f"{name}-per-block"]
    assert "Please pass the argument `trust_remote_code=True`" in said, said


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_tokenizer_of_a_per_block_folder_is_found(folders, byte_tokenizer, tmp_path, name):
    copy = shutil.copytree(folders[0] / f"{name}-per-block", tmp_path / "copy")
    byte_tokenizer.save_pretrained(copy)
    assert load_tokenizer(find_model(copy))("a")["input_ids"] == byte_tokenizer("a")["input_ids"]


@pytest.fixture(scope="module")
def oldest(tmp_path_factory):
    """A folder with the oldest transformers that opens our folders; skips where pip cannot get it."""
    folder = tmp_path_factory.mktemp("oldest")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *OLDEST]
    if subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode:
        pytest.skip(f"pip cannot install {OLDEST[0]}")
    return folder


@pytest.fixture(scope="module")
def with_oldest(folders, oldest):
    """What that transformers computed of the stock and the per-block folders."""
    root = folders[0].parent / "oldest-folders"
    root.mkdir()
    for folder in folders[0].glob("*-*"):
        (root / folder.name).symlink_to(folder)
    _run("open_with_code.py", root, packages=oldest)
    assert f"transformers=={json.loads((root / 'said.json').read_text())['version']}" == OLDEST[0]
    return load_file(root / "with-code.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("mode", ["per-block", "uniform"])
def test_the_oldest_transformers_computes_the_same(folders, with_oldest, name, mode):
    _same_as_in_memory(with_oldest, folders[1], name, mode)


@pytest.mark.slow
def test_a_real_model_computes_the_same_in_the_oldest_and_the_newest_transformers(tmp_path, oldest):
    try:
        path = model_file()
    except CheckpointError:
        pytest.skip("the package with SmolLM2 is not installed")
    (tmp_path / "folders").mkdir()
    for mode, options in (("uniform", {}), ("per-block", {"per_block": True, "allocator": "per-module"})):
        prune(path, tmp_path / "folders" / f"smollm2-{mode}", recipe="l2", sparsity=0.2, dtype="float32", **options)
    _run("open_with_code.py", tmp_path / "folders")
    newest = load_file(tmp_path / "folders" / "with-code.safetensors")
    (tmp_path / "folders" / "again").rename(tmp_path / "again")
    _run("open_with_code.py", tmp_path / "folders", packages=oldest)
    older = load_file(tmp_path / "folders" / "with-code.safetensors")
    for mode in ("uniform", "per-block"):
        model = {("smollm2", mode): load(tmp_path / "folders" / f"smollm2-{mode}").eval()}
        for found in (newest, older):
            _same_as_in_memory(found, model, "smollm2", mode, eager=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["per-block", "uniform"])
@pytest.mark.parametrize("name", sorted(TINY.keys() - {"bert"}))
def test_lora_attaches_trains_and_merges(folders, tmp_path, name, mode):
    pytest.importorskip("peft")
    _run("tune_with_peft.py", folders[0] / f"{name}-{mode}", tmp_path / "tuned")
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    assert bool(list((tmp_path / "tuned").glob("modeling_*.py"))) == (mode == "per-block")


@pytest.mark.parametrize("model_class", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_heads_of_an_encoder_open_by_the_code_in_the_folder(tmp_path, model_class):
    model = tiny_model("bert", model_class=model_class)
    report = prune_(model, NO_TEXT, _recipe("per-block"))
    save(model, report, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    auto = f"AutoModelFor{model_class.removeprefix('BertFor')}"
    assert config["auto_map"][auto] == f"modeling_bert_per_block.PerBlock{model_class}"
    assert config["architectures"] == [f"PerBlock{model_class}"]


def test_the_modeling_file_is_formatted_and_knows_nothing_of_prunelm():
    for name in TINY:
        _, text = modeling_file(tiny_model(name))
        imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert imported == {"huggingface_hub.dataclasses", "torch", "transformers"}
        assert max(map(len, text.splitlines())) <= 120


def test_per_block_folders_of_the_first_version_still_open(tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    save(model, prune_(model, NO_TEXT, _recipe("per-block")), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(stock_names(json.loads(path.read_text()))))
    (tmp_path / "out" / "modeling_llama_per_block.py").unlink()
    fed = {"input_ids": torch.arange(3, 15)[None]}
    assert torch.equal(outputs(load(tmp_path / "out"), fed), outputs(model, fed))


def test_a_llama_with_a_head_count_stock_llama_refuses_is_written_as_mistral(tmp_path):
    model = tiny_model("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    report = prune_(model, NO_TEXT, Recipe.load("l2", sparsity=0.3, multiple_of=1, attention_share=1.0))
    assert model.config.num_attention_heads == 6
    save(model, report, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["sliding_window"]) == ("mistral", None)
    assert config["architectures"] == ["MistralForCausalLM"]


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_gemma_keeps_head_counts_that_divide_its_hidden_size(name):
    model = tiny_model(name, hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    prune_(model, NO_TEXT, Recipe.load("l2", sparsity=0.3, multiple_of=1))
    assert model.config.num_attention_heads in {8, 4}


def test_rope_is_written_for_old_and_new_readers(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("llama", rope_parameters=rope)
    save(model, prune_(model, NO_TEXT, Recipe.load("l2", sparsity=0.3, multiple_of=1)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5e5
    assert config["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["head_dim"] == 8


def test_sharded_and_half_precision_folders_prove_themselves(tmp_path):
    model = tiny_model("qwen2")
    report = prune_(model, NO_TEXT, Recipe.load("l2", sparsity=0.3, multiple_of=1))
    save(model, report, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_folder_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    from prunelm import checkpoint

    model = tiny_model("llama")
    report = prune_(model, NO_TEXT, Recipe.load("l2", sparsity=0.3, multiple_of=1))
    honest = checkpoint._write_weights

    def spoiled(model, config, folder, *further):
        weight = model.model.layers[0].mlp.down_proj.weight
        weight.data += 1.0
        honest(model, config, folder, *further)
        weight.data -= 1.0

    monkeypatch.setattr(checkpoint, "_write_weights", spoiled)
    with pytest.raises(CheckpointError, match="gives other logits"):
        save(model, report, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_per_block_folder_can_be_pruned_again_with_other_units(tmp_path):
    model = tiny_model("llama", num_hidden_layers=3)
    first = Recipe.load("random", sparsity=0.3, multiple_of=1, allocator="per-module", per_block=True, blocks="1:")
    save(model, prune_(model, NO_TEXT, first), tmp_path / "once")
    again = load(tmp_path / "once")
    second = Recipe.load("l2", sparsity=0.2, multiple_of=1, allocator="per-module", per_block=True, unit="query")
    save(again, prune_(again, NO_TEXT, second), tmp_path / "twice")
    assert load(tmp_path / "twice").num_parameters() == again.num_parameters() < model.num_parameters()
