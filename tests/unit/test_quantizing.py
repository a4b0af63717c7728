"""Weights rounded to a format are those of the file, and pruning is held against quantization at equal bytes."""

import gguf
import pytest
import torch

from prunelm.commands.compare import quantized_table
from prunelm.errors import BudgetError
from prunelm.quantizing import at_equal_bytes, check_formats, rounded_to
from prunelm.sites import find_blocks, find_sites, narrow_, weight_of
from prunelm.storage import PLAIN
from prunelm.testing import tiny_model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("form", PLAIN)
def test_values_are_rounded_and_nothing_else_changes(name, form):
    model = tiny_model(name, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rounded = rounded_to(model, form).state_dict()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    changed = [key for key, value in before.items() if not torch.equal(rounded[key], value)]
    assert bool(changed) == (form != "f32")
    assert all(before[key].dim() > 1 for key in changed)
    assert all((rounded[key] - before[key]).abs().max() < before[key].abs().max() / 7 for key in changed)


def test_dense_at_equal_bytes_lies_between_its_formats():
    dense = [{"bytes": 100, "value": 16.0}, {"bytes": 400, "value": 4.0}]
    assert at_equal_bytes(dense, {"bytes": 200}) == pytest.approx(8.0)
    assert at_equal_bytes(dense, {"bytes": 100}) == pytest.approx(16.0)
    assert at_equal_bytes(dense, {"bytes": 99}) is None
    assert at_equal_bytes(dense, {"bytes": 1000}) == pytest.approx(4.0)
    assert at_equal_bytes([*dense, {"bytes": 300, "value": 90.0}], {"bytes": 300}) == pytest.approx(16.0)
    facts = {"metric": "perplexity", "error": 0.1}
    rows = [
        {"model": "d", "quantized": [{"format": "a", **facts, **row} for row in dense]},
        {"model": "p", "quantized": [{"format": "a", **facts, "bytes": 200, "value": 6.0}]},
    ]
    table = quantized_table(rows)
    assert [list(column.cells) for column in table.columns][4:] == [["", "8", ""], ["", "0.750", ""]]


def test_formats_that_cannot_be_made_here():
    assert check_formats(["FP16", "q8"]) == ["f16", "q8_0"]
    with pytest.raises(BudgetError, match=r"values cannot be rounded to 'q4_k_m' here. Did you mean"):
        check_formats(["q4_k_m"])
    with pytest.raises(BudgetError, match="unknown format 'q3'"):
        check_formats(["q3"])


def test_the_command_holds_pruning_against_quantization(cli, tiny_folder, text_file):
    model = tiny_folder("llama")
    options = ("--text", text_file, "--length", "32", "--max-tokens", "320", "--quantized", "f16,q8_0")
    ran = cli("compare", model, model, *options)
    assert ran.code == 0, ran
    assert "dense in as many bytes" in ran.out
    assert "1.000" in ran.out


def test_rows_of_a_square_layer_are_those_of_the_file():
    model = tiny_model("gpt2", hidden_size=64, intermediate_size=64, num_attention_heads=4)
    layer = find_blocks(model)[1][0].attn.c_proj
    kind = gguf.GGMLQuantizationType.Q4_0
    rows = layer.weight.detach().T.contiguous().numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind)).T
    assert torch.equal(find_blocks(rounded_to(model, "q4_0"))[1][0].attn.c_proj.weight, expected)


@torch.no_grad()
def test_a_sublayer_without_units_has_nothing_to_round():
    model = tiny_model("llama")
    site = next(site for site in find_sites(model) if site.name == "ffn")
    narrow_(site, torch.arange(0))
    assert weight_of(find_blocks(rounded_to(model, "q8_0"))[1][0].mlp.down_proj).shape == (48, 0)
