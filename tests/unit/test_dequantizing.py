"""Quantized checkpoints are pruned as the floats that they stand for, or refused by the name of their method."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunelm.errors import UnsupportedModelError
from prunelm.loading import find_model, load_model
from prunelm.testing import tiny_model

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FP8_MAX = 448
BLOCK = 128


def tiled(weight):
    """A matrix in tiles of at most 128 x 128: (tile row, row, tile column, column)."""
    rows = min(BLOCK, weight.shape[0])
    return weight.reshape(-1, rows, weight.shape[1] // BLOCK, BLOCK)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory, byte_tokenizer):
    """A folder in FP8 with a scale for each tile, as DeepSeek and Qwen publish them, and the floats it stands for."""
    folder = tmp_path_factory.mktemp("models") / "fp8"
    tiny_model("llama", vocab_size=300, **SIZES).save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    stored, floats = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = floats[name] = weight
            continue
        tiles = tiled(weight)
        scale = tiles.abs().amax((1, 3), keepdim=True) / FP8_MAX
        small = (tiles / scale).to(torch.float8_e4m3fn)
        stored[name], stored[f"{name}_scale_inv"] = small.reshape(weight.shape), scale[:, 0, :, 0].contiguous()
        floats[name] = (small.float() * scale).reshape(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, quant_method="fp8", weight_block_size=[BLOCK, BLOCK], activation_scheme="dynamic")
    return folder, floats


def say(folder, **facts):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": facts}))


def test_fp8_is_the_floats_it_stands_for(fp8):
    folder, floats = fp8
    model = load_model(find_model(folder))
    assert not getattr(model.config, "quantization_config", None)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), floats[name], atol=0, rtol=0)


def test_fp8_is_pruned_into_an_ordinary_folder(fp8, cli, tmp_path):
    ran = cli("prune", fp8[0], tmp_path / "out", "--sparsity", "0.3", "--recipe", "l1", "--multiple-of", "1")
    assert ran.code == 0, ran
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "torchao"])
def test_other_methods_are_refused_by_name(method, fp8, tmp_path):
    folder = shutil.copytree(fp8[0], tmp_path / "model")
    say(folder, quant_method=method)
    with pytest.raises(
        UnsupportedModelError, match=rf"quantized by '{method}', .*: fp8, compressed-tensors and GGUF are"
    ):
        find_model(folder)


def test_a_missing_package_is_named(fp8, tmp_path, monkeypatch):
    folder = shutil.copytree(fp8[0], tmp_path / "model")
    say(folder, quant_method="compressed-tensors")
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UnsupportedModelError, match="pip install compressed-tensors to read them"):
        find_model(folder)


def test_int4_of_compressed_tensors(fp8, tmp_path):
    """Packed by the library itself, where it is installed."""
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    folder = shutil.copytree(fp8[0], tmp_path / "model")
    model = tiny_model("llama", vocab_size=300, **SIZES)
    model.save_pretrained(folder)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    options = {"ignore": ["lm_head"], "format": "pack-quantized", "quantization_status": "frozen"}
    quantization.apply_quantization_config(
        model, quantization.QuantizationConfig(config_groups={"group": scheme}, **options)
    )
    expected = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "weight_scale"):
            groups = layer.weight.detach().reshape(layer.weight.shape[0], -1, 32)
            scale = groups.abs().amax(-1) / 7
            layer.weight_scale.data = scale.to(layer.weight_scale.dtype)
            rounded = (groups / scale[..., None]).round().clamp(-8, 7) * scale[..., None]
            expected[f"{name}.weight"] = rounded.reshape(layer.weight.shape)
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    packed = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    compressor.update_config(str(folder))
    found = dict(load_model(find_model(folder)).named_parameters())
    assert len(expected) == 14
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].detach(), weight, atol=1e-5, rtol=1e-4)
