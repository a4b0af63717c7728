"""Models are found, checked and opened from wherever they are, and nothing of theirs is run unasked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import prunelm
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import CheckpointError, UnsupportedModelError
from prunelm.loading import (
    DEEPEST,
    Source,
    bytes_on_disk,
    find_dense,
    find_model,
    load,
    load_model,
    load_tokenizer,
    read_json,
    skeleton,
    stored_dtype,
)
from prunelm.pruning import prune_
from prunelm.recipe import Recipe, Scoring
from prunelm.testing import outputs, tiny_inputs, tiny_model

NOTHING = Batches(batches=[], facts={"tokens": 0, "sequences": 0})
REMOTE = """
from pathlib import Path
from transformers import LlamaForCausalLM

Path({marker!r}).write_text("run")

class MineForCausalLM(LlamaForCausalLM):
    pass
"""


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    def copy(name: str = "llama", **overrides: Any) -> Path:
        return Path(shutil.copytree(tiny_folder(name, **overrides), tmp_path / name))

    return copy


def edit_config(folder: Path, **values: Any) -> None:
    """Set config fields; those that are None go."""
    config = {**json.loads((folder / "config.json").read_text()), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def same(model: Any, other: Any) -> bool:
    inputs = tiny_inputs(model)
    return torch.equal(outputs(model, inputs), outputs(other, inputs))


def pruned_folder(out: Path, name: str = "llama", **fields: Any) -> Any:
    """The pruned model in memory, and `out` written from it without proof."""
    model = tiny_model(name)
    by_chance = Scoring(criterion="random")
    recipe = Recipe(**{"sparsity": 0.5, "attention": by_chance, "ffn": by_chance, "multiple_of": 1, **fields})
    report = prune_(model, NOTHING, recipe)
    save(model, report, out, prove=False)
    return model


# Finding.


def test_a_source_keeps_the_name_that_the_user_gave(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama")
    source = find_model(folder)
    assert source == Source(name=str(folder), folder=folder)
    assert source.plan() is None
    assert source.config()["model_type"] == "llama"
    assert find_model(str(folder)) == source


def test_a_folder_relative_to_here(tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    monkeypatch.chdir(folder.parent)
    assert same(load(folder.name), load(folder))
    assert find_model(folder.name).name == folder.name


def test_a_folder_that_a_checkpoint_shards(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = load(tiny_folder("llama"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    files = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 1
    source = find_model(tmp_path / "shards")
    assert same(load_model(source), model)
    assert bytes_on_disk(source) == sum(file.stat().st_size for file in files)


def test_weights_that_nobody_reads_are_not_counted(copied: Callable[..., Path]) -> None:
    """Some folders have the same weights a second time, as `consolidated.safetensors`."""
    folder = copied()
    weights = folder / "model.safetensors"
    shutil.copy(weights, folder / "consolidated.safetensors")
    assert bytes_on_disk(find_model(folder)) == weights.stat().st_size


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read: No such file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('"text"')
    with pytest.raises(CheckpointError, match=r"config\.json: a JSON object is expected, got str"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "config.json") == {"a": 1}


@pytest.mark.parametrize("levels", [DEEPEST - 1, DEEPEST])
def test_a_file_that_is_nested_deeply_is_refused(tmp_path, levels):
    (tmp_path / "config.json").write_text('{"a": ' + "[" * levels + "]" * levels + "}")
    if levels < DEEPEST:
        assert read_json(tmp_path / "config.json")
        return
    with pytest.raises(CheckpointError, match=r"config\.json: nested deeper than 64 levels; the file is damaged"):
        read_json(tmp_path / "config.json")


def test_pickle_weights_open_only_when_allowed(copied: Callable[..., Path], tiny_folder: Callable[..., Path]) -> None:
    folder = copied()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model\.bin\).*--allow-pickle"):
        find_model(folder)
    source = find_model(folder, allow_pickle=True)
    assert same(load_model(source), load(tiny_folder("llama")))
    assert bytes_on_disk(source) == (folder / "pytorch_model.bin").stat().st_size


def test_pickle_beside_safetensors_is_never_opened(
    copied: Callable[..., Path], tiny_folder: Callable[..., Path]
) -> None:
    folder = copied()
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    assert same(load(folder), load(tiny_folder("llama")))


# Opening.


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "phi3"])
def test_the_class_is_the_one_that_the_config_names(name: str, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(name)
    model = load(folder)
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    assert type(model).__name__ == architecture
    assert not model.training
    expected = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
    assert same(model, expected)


@pytest.mark.parametrize(
    "model_class", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertLMHeadModel"]
)
def test_heads_of_encoders(model_class: str, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("bert", model_class=model_class)
    assert type(load(folder)).__name__ == model_class
    assert type(skeleton(find_model(folder))).__name__ == model_class


def test_a_config_without_a_class_is_a_causal_model(
    copied: Callable[..., Path], tiny_folder: Callable[..., Path]
) -> None:
    folder = copied()
    edit_config(folder, architectures=None)
    assert isinstance(load(folder), LlamaForCausalLM)
    assert same(load(folder), load(tiny_folder("llama")))
    assert isinstance(skeleton(find_model(folder)), LlamaForCausalLM)


def test_dtype_is_the_stored_one_unless_asked(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    load(tiny_folder("llama")).to(torch.bfloat16).save_pretrained(half)
    assert load(half).dtype == torch.bfloat16
    assert load(half, dtype=torch.float32).dtype == torch.float32
    assert load_model(find_model(half)).dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": None, "torch_dtype": "float16"}, torch.float16),
        ({"dtype": None, "torch_dtype": None}, torch.float32),
        ({"dtype": "nn"}, torch.float32),
    ],
    ids=str,
)
def test_stored_dtype(values: dict[str, Any], expected: torch.dtype, copied: Callable[..., Path]) -> None:
    folder = copied()
    edit_config(folder, **values)
    assert stored_dtype(find_model(folder)) == expected


def test_weights_that_are_missing_are_named(copied: Callable[..., Path]) -> None:
    from safetensors.torch import save_file

    folder = copied()
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"], weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"2 weights are missing.*first model\.layers\.0\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert"])
def test_skeleton_has_the_shapes_and_no_memory(name: str, copied: Callable[..., Path]) -> None:
    folder = copied(name)
    real = {key: tuple(p.shape) for key, p in load(folder).named_parameters()}
    content = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    (folder / "model.safetensors").write_bytes(content[:header] + b"\xff" * (len(content) - header))
    shapes = skeleton(find_model(folder))
    assert {key: tuple(p.shape) for key, p in shapes.named_parameters()} == real
    assert all(p.is_meta for p in shapes.parameters())


def test_tokenizer(tiny_folder: Callable[..., Path], copied: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(find_model(tiny_folder("llama")))
    assert tokenizer.decode(tokenizer("a caf\u00e9")["input_ids"]) == "a caf\u00e9"
    folder = copied()
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded"):
        load_tokenizer(find_model(folder))


# Code that comes with a checkpoint.


@pytest.fixture
def with_code(copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with modeling code of its own, and the file that appears once that code has been run."""
    folder, marker = copied(), tmp_path / "marker"
    (folder / "modeling_mine.py").write_text(REMOTE.format(marker=str(marker)))
    mapped = {"AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_config(folder, architectures=["MineForCausalLM"], auto_map=mapped)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder, marker


def test_code_is_not_run_unasked(with_code: tuple[Path, Path]) -> None:
    folder, marker = with_code
    for run in (load_model, skeleton):
        with pytest.raises(UnsupportedModelError, match=r"no class 'MineForCausalLM'.*--trust-remote-code"):
            run(find_model(folder))
    assert not marker.exists()


def test_code_is_run_when_trusted(with_code: tuple[Path, Path], tiny_folder: Callable[..., Path]) -> None:
    folder, marker = with_code
    source = find_model(folder, trust_remote_code=True)
    model = load_model(source)
    assert type(model).__name__ == "MineForCausalLM"
    assert marker.exists()
    assert same(model, load(tiny_folder("llama")))
    shapes = skeleton(source)
    assert {key: p.shape for key, p in shapes.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}


def test_code_of_a_tokenizer_is_not_run_unasked(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda _prompt: pytest.fail("a question was asked"))
    folder = copied()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    with pytest.raises(CheckpointError, match="say --trust-remote-code"):
        load_tokenizer(find_model(folder))


@pytest.mark.parametrize("model_class", [None, "BertForSequenceClassification"])
def test_a_trusted_encoder_opens_as_its_config_says(
    model_class: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stock class, or by the class of its own code where that is named, with or without its pruning.json."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny_model("bert", model_class=model_class).save_pretrained(tmp_path / "dense")
    dense = find_model(tmp_path / "dense", trust_remote_code=True)
    assert same(load_model(dense), load(tmp_path / "dense"))
    model = tiny_model("bert", model_class=model_class)
    recipe = Recipe.load("l2", sparsity=0.25, multiple_of=1, per_block=True, allocator="per-module", blocks="1:")
    save(model, prune_(model, NOTHING, recipe), tmp_path / "out", source=dense, prove=False)
    for with_plan in (True, False):
        source = find_model(tmp_path / "out", trust_remote_code=True)
        opened = load_model(source)
        assert type(opened).__name__.removeprefix("PerBlock") == type(model).__name__
        assert same(opened, model)
        assert len(list(skeleton(source).parameters())) == len(list(model.parameters()))
        if with_plan:
            (tmp_path / "out" / "pruning.json").unlink()
    monkeypatch.setattr("builtins.input", lambda _prompt: pytest.fail("a question was asked"))
    for run in (load_model, skeleton):
        with pytest.raises(CheckpointError, match=r"without pruning\.json only its code.*--trust-remote-code"):
            run(find_model(tmp_path / "out"))


# Checkpoints that PruneLM wrote.


def test_uniform_widths_open_as_stock(tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "out", of="model", sparsity=0.3)
    source = find_model(tmp_path / "out")
    plan = source.plan()
    assert plan is not None
    assert plan["loader"] == "transformers"
    assert same(load(tmp_path / "out"), model)


@pytest.mark.parametrize(
    ("name", "unit"), [("llama", "group"), ("llama", "query"), ("gpt2", "group"), ("bert", "group")]
)
def test_uneven_widths_open_with_ours(name: str, unit: str, tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "out", name, unit=unit, per_block=True, allocator="per-module", sparsity=0.45)
    source = find_model(tmp_path / "out")
    plan = source.plan()
    assert plan is not None
    assert plan["loader"] == "prunelm"
    again = load(tmp_path / "out")
    assert same(again, model)
    assert isinstance(again, type(tiny_model(name)))
    shapes = skeleton(source)
    assert {key: p.shape for key, p in shapes.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    assert all(p.is_meta for p in shapes.parameters())


def test_stock_loaders_refuse_uneven_widths(tmp_path: Path) -> None:
    pruned_folder(tmp_path / "out", per_block=True, allocator="per-module")
    with pytest.raises(RuntimeError, match=r"per-layer|size"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_future_format_is_refused(tmp_path: Path) -> None:
    pruned_folder(tmp_path / "out", per_block=True)
    path = tmp_path / "out" / "pruning.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(CheckpointError, match=r"pruning\.json: format 2 is not known here \(this version reads 1\)"):
        prunelm.load(tmp_path / "out")


def test_config_of_uneven_widths_names_each_block(tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "out", per_block=True, allocator="per-module", sparsity=0.45)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for i, block in enumerate(model.model.layers):
        widths = {**config, **config["per_layer_config"].get(str(i), {})}
        assert widths["intermediate_size"] == block.mlp.down_proj.in_features
        assert widths["num_key_value_heads"] * 8 == block.self_attn.k_proj.out_features


def test_the_tokenizer_of_a_per_block_folder_needs_no_named_class(per_block: Path, tmp_path: Path) -> None:
    folder = tmp_path / "per-block"
    shutil.copytree(per_block, folder)
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"] = {"0": {"num_attention_heads": 4, "num_key_value_heads": 2}}
    (folder / "config.json").write_text(json.dumps(config))
    named = json.loads((folder / "tokenizer_config.json").read_text())
    del named["tokenizer_class"]
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    assert load_tokenizer(find_model(folder))("abc")["input_ids"]


def test_a_dense_model_that_is_not_there_and_was_not_named(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "pruned"))
    for more, says in (({}, "/no/such"), ({"base_model": "first"}, "was made from first")):
        (folder / "pruning.json").write_text(json.dumps({"format": 1, "loader": "transformers", "widths": {}, **more}))
        with pytest.raises(CheckpointError, match=says):
            find_dense("/no/such", find_model(folder))
