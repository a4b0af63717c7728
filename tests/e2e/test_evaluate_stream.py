"""`prunelm evaluate --stream`: one block in memory at a time, and the numbers of a model that is all there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunelm
from prunelm import streamed_scores
from prunelm.errors import EvaluationError, RecipeError
from prunelm.shelf import META, Shelf
from prunelm.testing import TINY

SIZES = {"length": 32, "max_tokens": 200}
CAUSAL = [family for family in TINY if family != "bert"]


@pytest.fixture
def pairs(monkeypatch):
    """Windows pass in twos, so that the last of an odd number is alone."""
    monkeypatch.setattr(streamed_scores, "STATES", 2 * 32 * 48 * 4)


@pytest.mark.parametrize("family", CAUSAL)
def test_the_numbers_are_those_of_a_model_in_memory(tiny_folder, text_file, pairs, family):
    model, dense = tiny_folder(family, num_hidden_layers=3), tiny_folder(family)
    for against in (None, dense):
        streamed = prunelm.evaluate(model, text_file, against=against, stream=True, **SIZES)
        assert streamed.to_dict() == prunelm.evaluate(model, text_file, against=against, **SIZES).to_dict()
        assert streamed.facts["sequences"] > 3


def test_widths_per_block_stream_too(per_block, text_file, pairs):
    streamed = prunelm.evaluate(per_block, text_file, stream=True, **SIZES)
    assert streamed == prunelm.evaluate(per_block, text_file, **SIZES)


def test_one_block_is_in_memory_at_a_time(tiny_folder, text_file, pairs, monkeypatch):
    ran, opened = [], Shelf.opened

    def watched(self, i):
        there = [n for n, block in enumerate(self.blocks) for p in block.parameters() if p.device != META]
        ran.append((i, set(there)))
        return opened(self, i)

    monkeypatch.setattr(Shelf, "opened", watched)
    monkeypatch.setattr("prunelm.workflow.evaluating.load_model", lambda *_: pytest.fail("loaded"))
    found = prunelm.evaluate(tiny_folder("llama", num_hidden_layers=3), text_file, stream=True, **SIZES)
    assert all(there <= {i} for i, there in ran)
    passes = -(-found.facts["sequences"] // 2)
    assert [i for i, there in ran if not there] == [0, 1, 2] * passes


def test_the_block_that_is_damaged_is_named(tiny_folder, text_file, tmp_path):
    shutil.copytree(tiny_folder("llama", num_hidden_layers=3), tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = torch.inf
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match="where block 1 gave the first value that is not finite"):
        prunelm.evaluate(tmp_path / "damaged", text_file, stream=True, **SIZES)


def test_what_cannot_stream_is_refused(tiny_folder, text_file, tmp_path):
    with pytest.raises(EvaluationError, match=r"--stream measures causal models, and .* is none"):
        prunelm.evaluate(tiny_folder("bert"), text_file, stream=True, **SIZES)
    shutil.copytree(tiny_folder("llama"), tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="this checkpoint is quantized"):
        prunelm.evaluate(tmp_path / "quantized", text_file, stream=True, **SIZES)


def test_the_command(cli, tiny_folder, text_file):
    words = ("evaluate", tiny_folder("llama"), "--text", text_file, "--length", "32", "--max-tokens", "128", "--json")
    streamed, whole = cli(*words, "--stream"), cli(*words)
    assert streamed.code == whole.code == 0
    assert json.loads(streamed.out) == json.loads(whole.out)
    refused = cli(*words, "--stream", "--parts", "quality")
    assert refused.code == 1
    assert "--stream measures quality alone" in refused.err
