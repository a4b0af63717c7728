"""Sizes that a config or a header names are compared with what the weight files hold before anything is allocated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from tests import forked

from prunelm.errors import CheckpointError
from prunelm.headers import Held, check_axes, check_blocks, held_in, no_more_weights
from prunelm.loading import find_model, load_model, skeleton, weight_files
from prunelm.shelf import Shelf
from prunelm.testing import outputs, tiny_inputs, tiny_model

MANY = 20_000_000
BOUNDED = """
import resource, sys
from pathlib import Path
status = Path("/proc/self/status").read_text().splitlines()
now = int(next(line for line in status if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (now + {more}, -1))
sys.argv = ["prunelm", *{words}]
from prunelm.cli import main
main()
"""
"""The command line with so many bytes more than the libraries take; 20 million rows of 48 numbers are 3.8 GB."""


@pytest.fixture
def damaged(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (source, **fields) -> a copy of a folder, or a tiny model's, whose config.json says something else."""

    def make(source: str | Path, **fields: Any) -> Path:
        folder = source if isinstance(source, Path) else tiny_folder(source)
        copy = Path(shutil.copytree(folder, tmp_path / "model"))
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | fields))
        return copy

    return make


def gguf(path: Path, without: str = "", **sizes: int) -> Path:
    """A llama of one block, without one of its tensors, whose header says such sizes."""
    said = {"block_count": 1, "embedding_length": 64, "feed_forward_length": 128, **sizes}
    writer = GGUFWriter(path, "llama")
    for name, size in said.items():
        getattr(writer, f"add_{name}")(size)
    writer.add_context_length(128)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    shapes = {"token_embd": (3, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_up": (128, 64), "blk.0.ffn_gate": (128, 64), "blk.0.ffn_down": (64, 128)}
    for name, shape in shapes.items():
        if name != without:
            writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pickled(folder: Path) -> Path:
    """The folder, with its weights in a pickle file."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "says"),
    [
        ("llama", {"vocab_size": MANY}, r"1 weights .*first model\.embed_tokens\.weight: \(300, 48\) in the file, \(2"),
        (
            "llama",
            {"intermediate_size": MANY},
            r"gate_proj\.weight: \(40, 48\) in the file, \(20000000, 48\) by the config",
        ),
        (
            "llama",
            {"num_hidden_layers": 3_000_000},
            r"config\.json: num_hidden_layers is 3,000,000, and .* than 20 tensors",
        ),
        ("gpt2", {"n_positions": MANY}, r"transformer\.wpe\.weight: \(\d+, 48\) in the file, \(20000000, 48\) by"),
        ("gpt2", {"n_layer": 10**15}, r"config\.json: n_layer is 1,000,000,000,000,000, and the weight files hold"),
        ("bert", {"vocab_size": MANY}, r"word_embeddings\.weight: \(300, 48\) in the file"),
    ],
)
def test_a_config_is_not_believed(name: str, fields: dict[str, int], says: str, damaged: Callable[..., Path]) -> None:
    folder = damaged(name, **fields)
    for opened in (skeleton, load_model, Shelf):
        with pytest.raises(CheckpointError, match=says):
            opened(find_model(folder))


def test_a_config_of_a_folder_per_block_is_not_believed(per_block: Path, damaged: Callable[..., Path]) -> None:
    with pytest.raises(
        CheckpointError, match=r"was \(20000000, 48\) before it was pruned, .* no more than [\d,]+ numbers"
    ):
        load_model(find_model(damaged(per_block, intermediate_size=MANY)))


def test_a_config_beside_pickle_files_is_not_believed(damaged: Callable[..., Path]) -> None:
    folder = pickled(damaged("llama", vocab_size=MANY))
    with pytest.raises(CheckpointError, match=r"asks for 960,\d{3},\d{3} numbers, and the files hold no more than"):
        load_model(find_model(folder, allow_pickle=True))


def test_more_weights_than_tensors_end_it_while_the_model_is_built(damaged: Callable[..., Path]) -> None:
    folder = pickled(damaged("llama", num_hidden_layers=1200))
    with pytest.raises(CheckpointError, match=r"asks for more than [\d,]+ weights, and the files hold no more than 1,"):
        skeleton(find_model(folder, allow_pickle=True))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"block_count": 2_000_000}, r"model\.gguf: block_count is 2,000,000, and the file holds 11 tensors"),
        (
            {"feed_forward_length": 256},
            r"3 weights .*mlp\.down_proj\.weight: \(64, 128\) in the file, \(64, 256\) by the",
        ),
        ({"block_count": 2}, r"9 weights are missing, first model\.layers\.1\.input_layernorm\.weight"),
        ({"without": "blk.0.ffn_up"}, r"1 weights are missing, first model\.layers\.0\.mlp\.up_proj\.weight"),
        ({"feed_forward_length": MANY}, r"asks for 3,840,\d{3},\d{3} numbers, and the files hold no more than 41,"),
    ],
)
def test_a_gguf_header_is_not_believed(sizes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        load_model(find_model(gguf(tmp_path / "model.gguf", **sizes)))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (("evaluate", "--length", "32", "--text"), {"vocab_size": MANY}),
        (("evaluate", "--length", "32", "--text"), {"intermediate_size": MANY}),
        (("inspect",), {"num_hidden_layers": 3_000_000}),
    ],
)
def test_so_much_is_never_allocated(
    command: tuple[str, ...], fields: dict[str, int], damaged: Callable[..., Path], text_file: Path
) -> None:
    words = [*command, *([str(text_file)] if "--text" in command else []), str(damaged("llama", **fields))]
    ran = forked.run("-c", BOUNDED.format(more=1 << 30, words=words))
    assert ran.returncode == 1, ran
    assert "by the config" in ran.stderr or "num_hidden_layers is 3,000,000" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


# What is right stays right.


def test_a_bare_model_and_one_with_a_head_read_each_other(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.save_pretrained(tmp_path / "bare")
    source = find_model(tmp_path / "bare")
    assert skeleton(source).num_parameters() == model.model.num_parameters()
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    skeleton(source)
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config | {"vocab_size": MANY}))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: \(\d+, 48\) in the file, \(20000000, 48\) by"):
        skeleton(source)


def test_tied_weights_may_be_stored_under_either_name(damaged: Callable[..., Path]) -> None:
    folder = damaged("gpt2")
    whole = load_model(find_model(folder))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("transformer.wte.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    inputs = tiny_inputs(whole)
    assert torch.equal(outputs(load_model(find_model(folder)), inputs), outputs(whole, inputs))


def test_blocks_of_a_part_are_counted_too() -> None:
    held = Held(tensors=20, numbers=9)
    check_blocks(
        {"model_type": "gpt2", "n_layer": 20, "text_config": {"num_hidden_layers": "no number"}}, held, Path("c")
    )
    with pytest.raises(CheckpointError, match="c: num_hidden_layers is 21, and the weight files hold no more than 20"):
        check_blocks({"text_config": {"num_hidden_layers": 21}}, held, Path("c"))


def test_a_file_that_is_not_read_does_not_count(damaged: Callable[..., Path]) -> None:
    folder = damaged("llama")
    save_file({"model.embed_tokens.weight": torch.zeros(3, 5)}, folder / "older.safetensors")
    load_model(find_model(folder))


def test_other_files_beside_pickles_and_an_index_beside_the_whole_do_not_count(damaged: Callable[..., Path]) -> None:
    folder = damaged("llama")
    save_file({"model.embed_tokens.weight": torch.zeros(3, 5)}, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    load_model(find_model(folder), dtype=None)
    (folder / "model.safetensors.index.json").unlink()
    source = find_model(pickled(folder), allow_pickle=True)
    assert [file.name for file in weight_files(source)] == ["pytorch_model.bin"]
    load_model(source)


def test_masks_that_a_model_computes_are_not_weights(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(
        hidden_size=8,
        num_layers=8,
        num_heads=2,
        vocab_size=99,
        attention_types=[[["global", "local"], 4]],
        max_position_embeddings=2048,
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path)
    load_model(find_model(tmp_path))


def test_headers_of_all_files_count(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5)}, tmp_path / "a")
    save_file({"b": torch.zeros(7), "empty": torch.zeros(0, 4)}, tmp_path / "b")
    found = held_in([tmp_path / "a", tmp_path / "b"])
    assert found == Held(tensors=3, numbers=22, shapes={"a": (3, 5), "b": (7,), "empty": (0, 4)})


def test_nothing_is_counted_once_the_model_stands() -> None:
    model = tiny_model("llama")
    held = Held(tensors=len(list(model.parameters())), numbers=model.num_parameters())
    with no_more_weights(held, "m"):
        tiny_model("llama")
    check_axes(model, held, "m")
    for _ in range(held.tensors):
        torch.nn.Linear(1, 1)


def test_shared_blocks_are_no_lie(tmp_path: Path) -> None:
    sizes = {"vocab_size": 60, "hidden_size": 48, "embedding_size": 16, "intermediate_size": 40}
    config = transformers.AlbertConfig(num_hidden_layers=12, num_attention_heads=6, **sizes)
    transformers.AlbertModel(config).save_pretrained(tmp_path)
    skeleton(find_model(tmp_path))
