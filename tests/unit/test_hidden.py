import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.testing import TINY, check_hidden, outputs, tiny_inputs, tiny_model

STOCK = ("llama", "mistral", "qwen2", "qwen3", "phi3")
CASES = [(name, "per-block") for name in sorted(TINY)] + [(name, "uniform") for name in STOCK]

VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"vocab_size": 48}),
    ("gpt2", {"n_inner": 56}),
    ("bert", {"model_class": "BertForMaskedLM"}),
    ("bert", {"model_class": "BertForSequenceClassification", "num_labels": 48}),
    ("gpt2", {"model_class": "GPT2ForSequenceClassification", "pad_token_id": 0}),
    ("llama", {"model_class": "LlamaForSequenceClassification"}),
]


@pytest.mark.parametrize("name", sorted(TINY))
def test_removing_hidden_channels_equals_silencing_them(name):
    check_hidden(lambda: tiny_model(name))


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_variants_of_families(name, overrides):
    build = lambda: tiny_model(name, **overrides)  # noqa: E731
    check_hidden(build, inputs=tiny_inputs(build(), padded=name == "bert"))


def calibration(model, batches=30):
    found = [tiny_inputs(model, seed=seed) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches})


def recipe(**overrides):
    usual = {"sparsity": 0.5, "multiple_of": 1, "hidden": 0.25, "samples": 16, "length": 12}
    return Recipe.load("liar", **{**usual, **overrides})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Narrowed and repaired models in memory, and what a fresh process reads from their folders."""
    root = tmp_path_factory.mktemp("folders")
    models = {}
    for name, mode in CASES:
        model = tiny_model(name, num_hidden_layers=3)
        report = prune_(model, calibration(model), recipe(per_block=mode == "per-block"))
        save(model, report, root / f"{name}-{mode}", prove=False)
        models[name, mode] = model
    script = Path(__file__).parents[1] / "conformance" / "load_folders.py"
    run = subprocess.run([sys.executable, str(script), str(root)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return root, models, load_file(root / "found.safetensors")


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_fresh_process_computes_the_same(folders, name, mode):
    root, models, found = folders
    model = models[name, mode]
    ids = torch.arange(3, 15)[None]
    assert (found[f"{name}-{mode}.logits"] - outputs(model, {"input_ids": ids})).abs().max() < 1e-4
    if model.can_generate():
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(found[f"{name}-{mode}.tokens"], tokens)
    if model.get_output_embeddings() is not None:
        assert bool(found[f"{name}-{mode}.tied"])
    facts = json.loads((root / f"{name}-{mode}" / "pruning.json").read_text())
    assert facts["loader"] == ("transformers" if mode == "uniform" else "prunelm")
    assert facts["widths"]["hidden"] == {"units": 36}
    assert len(facts["hidden"]["kept"]) == 36
