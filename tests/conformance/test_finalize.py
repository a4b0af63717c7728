"""Folders that transformers saved again get back what it dropped."""

import json
import shutil

import pytest
import torch
import transformers
from tests import forked

import prunelm
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import CheckpointError
from prunelm.loading import load
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.testing import outputs, tiny_model

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
FED = {"input_ids": torch.arange(3, 15)[None]}


def pruned(folder, name="llama", *, per_block=False, **options):
    model = tiny_model(name, num_hidden_layers=3, **options)
    recipe = Recipe.load("l2", sparsity=0.25, multiple_of=1, attention_share=1.0)
    if per_block:
        recipe = Recipe.load("random", sparsity=0.3, multiple_of=1, allocator="per-module", per_block=True)
    save(model, prune_(model, NO_TEXT, recipe), folder, prove=False)
    return model


def config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(("name", "legacy"), [("llama", "rope_theta"), ("gpt_neox", "rotary_emb_base"), ("gpt2", None)])
def test_a_stock_folder_gets_its_legacy_keys_back(tmp_path, name, legacy):
    pruned(tmp_path / "one", name)
    opened = getattr(transformers, config(tmp_path / "one")["architectures"][0]).from_pretrained(tmp_path / "one")
    opened.save_pretrained(tmp_path / "two")
    assert "torch_dtype" not in config(tmp_path / "two")
    assert legacy not in config(tmp_path / "two")
    found = prunelm.finalize(tmp_path / "two")
    assert {"torch_dtype", legacy} - {None} <= set(found)
    before, after = config(tmp_path / "one"), config(tmp_path / "two")
    assert {k for k in before if after.get(k) != before[k]} == set()
    assert prunelm.finalize(tmp_path / "two") == []
    assert torch.equal(outputs(load(tmp_path / "two"), FED), outputs(opened, FED))


def test_settings_that_were_dropped_come_from_the_folder_it_is_like(tmp_path):
    pruned(tmp_path / "one", hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    assert config(tmp_path / "one")["model_type"] == "mistral"
    raw = config(tmp_path / "one")
    for name in ("one", "two"):
        (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / "two" / "model.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    (tmp_path / "two" / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if k != "sliding_window"}))
    assert prunelm.finalize(tmp_path / "two", like=tmp_path / "one") == ["pruning.json", "sliding_window"]
    assert config(tmp_path / "two") == raw


def test_a_per_block_folder_gets_its_table_names_and_code_back(tmp_path):
    model = pruned(tmp_path / "one", per_block=True)
    load(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert "per_layer_config" not in config(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d\..* is \(.*\), but .* --like"):
        prunelm.finalize(tmp_path / "two")
    found = prunelm.finalize(tmp_path / "two", like=tmp_path / "one")
    assert found[:2] == ["pruning.json", "modeling_llama_per_block.py"]
    assert {"architectures", "auto_map", "model_type", "per_layer_config", "rope_theta", "torch_dtype"} <= set(found)
    same = {"transformers_version"}
    before, after = config(tmp_path / "one"), config(tmp_path / "two")
    assert {k for k in before if after.get(k) != before[k]} <= same
    assert prunelm.finalize(tmp_path / "two") == []
    assert torch.equal(outputs(load(tmp_path / "two"), FED), outputs(model, FED))
    script = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        "print(A.from_pretrained(sys.argv[1], trust_remote_code=True).num_parameters())"
    )
    ran = forked.run("-c", script, str(tmp_path / "two"))
    assert ran.stdout.strip() == str(model.num_parameters()), ran.stderr


def test_a_complete_folder_is_left_alone(tmp_path):
    for name, per_block in (("stock", False), ("uneven", True)):
        pruned(tmp_path / name, per_block=per_block)
        before = (tmp_path / name / "config.json").read_bytes()
        assert prunelm.finalize(tmp_path / name) == []
        assert (tmp_path / name / "config.json").read_bytes() == before


def test_bad_input(tmp_path, cli):
    pruned(tmp_path / "one", per_block=True)
    pruned(tmp_path / "gpt2", "gpt2")
    with pytest.raises(CheckpointError, match=r"a gpt2 model, but .*one is llama"):
        prunelm.finalize(tmp_path / "one", like=tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="no such model"):
        prunelm.finalize(tmp_path / "nowhere")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"an adapter only\. Merge it"):
        prunelm.finalize(tmp_path / "adapter")
    ran = cli("finalize", tmp_path / "adapter")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    ran = cli("finalize", tmp_path / "gpt2")
    assert (ran.code, ran.out) == (0, f"{tmp_path / 'gpt2'}: nothing was missing\n")


@pytest.mark.parametrize("content", [b'{"loader": ', b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_plan_of_the_folder_it_is_like_is_named(tmp_path, content):
    pruned(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "pruning.json").unlink()
    (tmp_path / "one" / "pruning.json").write_bytes(content)
    before = (tmp_path / "two" / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"one/pruning\.json"):
        prunelm.finalize(tmp_path / "two", like=tmp_path / "one")
    assert (tmp_path / "two" / "config.json").read_bytes() == before
