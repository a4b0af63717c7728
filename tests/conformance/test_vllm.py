"""vLLM generates the same greedy tokens from what we write. PRUNELM_VLLM_PYTHON is a Python with vLLM (slow)."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

import prunelm
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites, narrow_
from prunelm.testing import tiny_model

NO_TEXT = Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none"})
NEW = 24
# Heads of 32: vLLM's attention on the CPU has no smaller ones.
SIZES = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 96,
    "num_hidden_layers": 3, "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip
OWN = {"mistral": {"sliding_window": None}}


def _uniform(family, folder, **options):
    model = tiny_model(family, **{**SIZES, **OWN.get(family, {})})
    recipe = Recipe.load("l2", sparsity=0.25, multiple_of=4, attention_share=1.2, **options)
    save(model, prune_(model, NO_TEXT, recipe), folder, prove=False)
    return model


def _per_block(family, folder, sites=("attention", "ffn")):
    model = tiny_model(family, **{**SIZES, **OWN.get(family, {})})
    options = {"allocator": "per-module", "per_block": True, "sites": sites, "targets": ("vllm",)}
    report = prune_(model, NO_TEXT, Recipe.load("random", sparsity=0.2, multiple_of=4, **options))
    for name, lost in (("attention", 1), ("ffn", 6)):
        if name in sites:
            site = next(site for site in find_sites(model) if site.key == f"2.{name}")
            narrow_(site, torch.arange(lost, site.n_units))
    save(model, report, folder, prove=False)
    return model


def _same_tokens(model, folder):
    python = os.environ.get("PRUNELM_VLLM_PYTHON")
    if python is None:
        pytest.skip("PRUNELM_VLLM_PYTHON names no Python with vLLM")
    ids = list(range(3, 15))
    prompt = torch.tensor([ids])
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}
    wanted = model.generate(prompt, attention_mask=torch.ones_like(prompt), **length)[0, len(ids) :].tolist()
    script = Path(__file__).parent / "generate_with_vllm.py"
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, str(script), str(folder), json.dumps(ids), str(NEW)]
    run = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=own)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.strip().splitlines()[-1]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "written"),
    [
        ("llama", {}, "mistral"),
        ("llama", {"bias": True, "targets": ("transformers", "vllm")}, "granite"),
        ("qwen2", {"targets": ("transformers", "vllm")}, "granite"),
        ("qwen3", {"targets": ("any",)}, "qwen3"),
    ],
)
def test_stock_folders(tmp_path, family, options, written):
    model = _uniform(family, tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == written
    _same_tokens(model, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_per_block_folders_by_the_code_that_they_carry(tmp_path, family):
    _same_tokens(_per_block(family, tmp_path / "out"), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_nemotron_nas_folders_by_its_own_class(tmp_path, family):
    model = _per_block(family, tmp_path / "model", sites=("ffn",))
    prunelm.export(tmp_path / "model", tmp_path / "out", format="nemotron-nas")
    _same_tokens(model, tmp_path / "out")
