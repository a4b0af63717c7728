"""Whatever is wrong, the user gets one line that says what and where, exit code 1, and no file."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
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

from prunelm.demo import check_sha256
from prunelm.errors import CheckpointError

SMALL = ("--samples", "8", "--length", "32")
L1 = ("--recipe", "l1", "--sparsity", "0.3")


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the checksum of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def error_of(ran: Any) -> str:
    """The one line of an error, its form checked."""
    lines = ran.err.splitlines()
    assert ran.code == 1, ran
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert lines, "nothing was said"
    assert lines[-1].startswith("error: "), ran.err
    assert all(line.startswith(("recipe: ", "note: ")) for line in lines[:-1]), ran.err
    return lines[-1]


@pytest.fixture
def refused(cli: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must be refused, with nothing changed below tmp_path; its error must match every pattern."""

    def check(*args: object, says: tuple[str, ...] = ()) -> str:
        before = tree(tmp_path)
        line = error_of(cli(*args))
        for pattern in says:
            assert re.search(pattern, line), f"{pattern!r} is not in: {line}"
        assert tree(tmp_path) == before
        return line

    return check


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (name, **overrides) -> a copy of a tiny model's folder that a test may damage."""

    def copy(name: str = "llama", **overrides: Any) -> Path:
        return Path(shutil.copytree(tiny_folder(name, **overrides), tmp_path / name))

    return copy


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# No such model, or a damaged one.


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such-folder", "some/such/deep/name", "nobody/no-such-model"])
def test_no_such_model(name: str, refused: Callable[..., str], tmp_path: Path) -> None:
    for command in (("inspect", name), ("prune", name, tmp_path / "out", *L1)):
        refused(*command, says=("no such model", re.escape(name)))


def test_no_such_model_in_a_fresh_process(forked_cli: Callable[..., Any], tmp_path: Path) -> None:
    ran = forked_cli("prune", "nobody/no-such-model", tmp_path / "out", *L1)
    assert "no such model: 'nobody/no-such-model'" in error_of(ran)
    assert "\x1b" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_model_folder(refused: Callable[..., str], text_file: Path) -> None:
    refused("inspect", text_file, says=("no such model", "words.txt"))


def test_a_name_is_said_as_it_is(refused: Callable[..., str]) -> None:
    name = "/no/[bold]such[/]/:heart:/folder"
    refused("inspect", name, says=(re.escape(name),))


def test_no_model_of_several_is_missed(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    refused("compare", tiny_folder("llama"), "/no/such", "--text", text_file, says=("no such model", "/no/such"))
    refused("evaluate", tiny_folder("llama"), "--against", "/no/such", "--text", text_file, says=("/no/such",))


def test_folder_without_config(refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path) -> None:
    model = copied()
    (model / "config.json").unlink()
    refused("prune", model, tmp_path / "out", *L1, says=("llama", r"config\.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{not json", "not valid JSON"),
        ("", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "object is expected, got list"),
        ("{}", "model_type"),
        ('{"model_type": 5}', "model_type"),
        (b"\xff\xfe\x00", "not valid JSON"),
    ],
    ids=["broken", "empty", "deep", "list", "no type", "number as type", "bytes"],
)
def test_config_that_is_no_config(
    content: str | bytes, says: str, refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    (model / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused("prune", model, tmp_path / "out", *L1, says=(r"config\.json", says))


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -48},
        {"num_attention_heads": 0},
        {"num_attention_heads": None},
        {"num_key_value_heads": 0},
        {"hidden_act": "no-such-function"},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [5]},
        {"architectures": ["torch"]},
        {"dtype": "no-such-type"},
        {"pad_token_id": 300},
        {"vocab_size": 10**30},
    ],
    ids=str,
)
@pytest.mark.parametrize("command", ["prune", "evaluate"])
def test_config_that_builds_no_model(
    command: str,
    values: dict[str, Any],
    refused: Callable[..., str],
    copied: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    model = copied()
    edit_json(model / "config.json", **values)
    if command == "prune":
        refused("prune", model, tmp_path / "out", *L1)
    else:
        refused("evaluate", model, "--text", text_file, "--length", "32", "--max-tokens", "64")


def test_model_without_blocks(refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path) -> None:
    model = copied()
    edit_json(model / "config.json", num_hidden_layers=0, layer_types=[])
    refused("prune", model, tmp_path / "out", *L1, says=("no site",))


@pytest.mark.parametrize("size", [0, 5, 300, -100])
def test_truncated_safetensors(
    size: int, refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    refused("prune", model, tmp_path / "out", *L1, says=(r"model\.safetensors", "cut short"))


def test_weights_that_are_missing_or_of_another_size(
    refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    model = copied()
    edit_weights(model, lambda weights: weights.pop(name))
    refused("prune", model, tmp_path / "out", *L1, says=(re.escape(name),))
    edit_weights(model, lambda weights: weights.update({name: torch.zeros(39, 48)}))
    refused("prune", model, tmp_path / "out", *L1, says=(re.escape(name),))


def test_no_weights_at_all(refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path) -> None:
    model = copied()
    (model / "model.safetensors").unlink()
    refused("prune", model, tmp_path / "out", *L1, says=(r"no \.safetensors",))


def test_pickle_weights(refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path) -> None:
    model = copied()
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused("prune", model, tmp_path / "out", *L1, says=("pickle", r"pytorch_model\.bin", "--allow-pickle"))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "below/inside.safetensors"])
def test_index_that_points_outside(
    name: str, refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    shutil.copy(model / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(model / "model.safetensors"), name)}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("prune", model, tmp_path / "out", *L1, says=("index.json", "outside the folder"))


def test_index_of_pickle_files_that_points_outside(
    refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    weights = load_file(model / "model.safetensors")
    torch.save(weights, tmp_path / "outside.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../outside.bin")}
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({}, model / "pytorch_model-00001.bin")
    refused("prune", model, tmp_path / "out", *L1, "--allow-pickle", says=(r"bin\.index\.json", "outside the folder"))


@pytest.mark.parametrize("named", ["somebody/attention", {"": "somebody/attention"}])
def test_attention_from_the_hub(
    named: Any, refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": named}))
    refused("prune", model, tmp_path / "out", *L1, says=("'somebody/attention' is code from the hub",))


def test_attention_that_is_not_installed(
    refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "attn_implementation": "flash_attention_2"}))
    refused("prune", model, tmp_path / "out", *L1, says=("its config builds no model: ",))


def test_processes_that_nobody_started(
    refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copied()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused("prune", model, tmp_path / "out", *L1, says=("not by torchrun: .*MASTER_ADDR",))
    monkeypatch.setenv("PRUNELM_PROCESS_TIMEOUT", "soon")
    refused("prune", model, tmp_path / "out", *L1, says=("PRUNELM_PROCESS_TIMEOUT must be a number .*'soon'",))


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_no_index(
    index: str, refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    (model / "model.safetensors.index.json").write_text(index)
    refused("prune", model, tmp_path / "out", *L1, says=(r"index\.json",))


def test_shard_that_is_missing(refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path) -> None:
    model = copied()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("prune", model, tmp_path / "out", *L1, says=(r"model-00002-of-00002\.safetensors",))


def test_folder_without_tokenizer(
    refused: Callable[..., str], copied: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = copied()
    for file in model.glob("tokenizer*"):
        file.unlink()
    recipe = ("--recipe", "wanda-sp", "--sparsity", "0.3", *SMALL, "--text", text_file)
    refused("prune", model, tmp_path / "out", *recipe, says=("no tokenizer",))


def test_damaged_tokenizer(
    refused: Callable[..., str], copied: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = copied()
    (model / "tokenizer.json").write_text("{broken")
    recipe = ("--recipe", "wanda-sp", "--sparsity", "0.3", *SMALL, "--text", text_file)
    refused("prune", model, tmp_path / "out", *recipe, says=("tokenizer",))


def test_tokenizer_of_another_model(
    refused: Callable[..., str], copied: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    model = copied("llama", vocab_size=90)
    recipe = ("--recipe", "wanda-sp", "--sparsity", "0.3", *SMALL, "--text", text_file)
    refused("prune", model, tmp_path / "out", *recipe)
    refused("evaluate", model, "--text", text_file, "--length", "32")


# GGUF files.


def write_gguf(path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for name in ("token_embd.weight", "output_norm.weight"):
        writer.add_tensor(name, np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_missing_gguf(refused: Callable[..., str], tmp_path: Path) -> None:
    refused("prune", tmp_path / "none.gguf", tmp_path / "out", *L1, says=("no such model", r"none\.gguf"))


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\x03\x00\x00\x00", None], ids=repr)
def test_gguf_of_random_bytes(content: bytes | None, refused: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "noise.gguf"
    model.write_bytes(random.Random(0).randbytes(5_000) if content is None else content)
    refused("prune", model, tmp_path / "out", *L1, says=(r"noise\.gguf", "GGUF|cut short"))


@pytest.mark.parametrize("seed", range(20))
def test_gguf_with_a_good_beginning_and_noise_after_it(seed: int, refused: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "noise.gguf"
    write_gguf(model)
    chooser = random.Random(seed)
    keep = chooser.randrange(8, 120)
    model.write_bytes(model.read_bytes()[:keep] + chooser.randbytes(2_000))
    refused("inspect", model, says=(r"noise\.gguf",))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_truncated_gguf(share: float, refused: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "short.gguf"
    write_gguf(model)
    content = model.read_bytes()
    model.write_bytes(content[: int(share * len(content))])
    refused("prune", model, tmp_path / "out", *L1, says=(r"short\.gguf", "damaged|cut short"))


def test_gguf_without_the_keys_of_a_model(refused: Callable[..., str], tmp_path: Path) -> None:
    model = tmp_path / "half.gguf"
    write_gguf(model)
    refused("prune", model, tmp_path / "out", *L1, says=(r"half\.gguf",))


def test_wrong_checksum_of_the_demo_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    check_sha256(file, digest)
    with pytest.raises(CheckpointError, match=f"{digest}.*{'0' * 64}"):
        check_sha256(file, "0" * 64)


# Families that cannot be pruned.


def save_other(folder: Path, model_class: str, **config: Any) -> Path:
    """A tiny model of a class that no tiny model of ours has."""
    cls = getattr(transformers, model_class)
    cls(cls.config_class(vocab_size=300, **config)).save_pretrained(folder)
    return folder


def test_family_that_nobody_described(refused: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = save_other(tmp_path / "t5", "T5ForConditionalGeneration", **sizes)
    for command in (("inspect", model), ("prune", model, tmp_path / "out", *L1)):
        refused(*command, says=("'t5'", "llama", r"docs/add-a-model\.md"))


def test_family_that_transformers_does_not_know(
    refused: Callable[..., str], copied: Callable[..., Path], tmp_path: Path
) -> None:
    model = copied()
    edit_json(model / "config.json", model_type="zorp", architectures=["ZorpForCausalLM"])
    refused("prune", model, tmp_path / "out", *L1, says=("zorp", "--trust-remote-code"))
    # Its class exists: what is unknown is the model type.
    edit_json(model / "config.json", model_type="zorp", architectures=["LlamaForCausalLM"])
    refused("prune", model, tmp_path / "out", *L1, says=("'zorp'",))


def test_alibi_is_refused_by_name(refused: Callable[..., str], tmp_path: Path) -> None:
    model = save_other(tmp_path / "bloom", "BloomForCausalLM", hidden_size=16, n_layer=1, n_head=2)
    refused("prune", model, tmp_path / "out", *L1, says=("bloom", "ALiBi"))


def test_experts_are_refused_by_name(refused: Callable[..., str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = save_other(tmp_path / "mixtral", "MixtralForCausalLM", **sizes, **heads)
    refused("prune", model, tmp_path / "out", *L1, says=("mixtral", "experts"))


def test_cross_attention_is_refused(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_folder("gpt2", add_cross_attention=True)
    refused("prune", model, tmp_path / "out", *L1, says=("gpt2", "add_cross_attention"))


# Budgets.


@pytest.mark.parametrize("sparsity", ["half", "0.1;0.2", "0.1,", ""])
def test_sparsity_that_is_no_number(
    sparsity: str, refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", sparsity)
    refused(*command, says=("sparsity must be a number, or several with commas", re.escape(repr(sparsity))))


def test_one_size_of_several_that_cannot_be_met_writes_none(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--multiple-of", "1")
    refused(*command, "--sparsity", "0.2,0.99", says=("cannot be met", "at most"))
    assert not (tmp_path / "out").exists()


def test_one_size_of_several_that_exists_is_refused(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out" / "0.4").mkdir(parents=True)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--multiple-of", "1")
    refused(*command, "--sparsity", "0.2,0.4", says=("exists", "--force"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["0.4"]


@pytest.mark.parametrize("sparsity", ["-0.1", "0", "1.0", "1.5", "nan", "inf"])
def test_sparsity_that_is_none(
    sparsity: str, refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", sparsity)
    refused(*command, says=("sparsity", re.escape(f"{float(sparsity):g}"), r"0\.2"))
    refused(*command, "--dry-run", says=("sparsity",))


def test_so_little_that_nothing_would_go(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", "0.000001")
    refused(*command, says=("nothing would go", r"at least 0\.\d+"))


def test_more_than_can_go(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", "0.99")
    # Two of three KV groups and 24 of 40 channels, in both blocks.
    most = 2 * (2 * 2_304 + 24 * 144)
    refused(*command, says=("0.99", f"at most {most:,} can go", r"at most 0\.\d+"))


ADVISED = {
    "llama, l1": ("llama", ("--recipe", "l1")),
    "llama, goa": ("llama", ("--recipe", "goa")),
    "llama, FFN alone": ("llama", ("--recipe", "l1", "--sites", "ffn")),
    "llama, attention alone": ("llama", ("--recipe", "l1", "--sites", "attention")),
    "llama, of the model": ("llama", ("--recipe", "l1", "--of", "model")),
    "llama, one block": ("llama", ("--recipe", "l1", "--blocks", "1:", "--per-block")),
    "llama, channels one by one": ("llama", ("--recipe", "l1", "--multiple-of", "1")),
    "llama, half of attention": ("llama", ("--recipe", "l1", "--attention-share", "0.5")),
    "llama, query heads": ("llama", ("--recipe", "l1", "--unit", "query")),
    "llama, per block": ("llama", ("--recipe", "l1", "--per-block")),
    "gpt2, l1": ("gpt2", ("--recipe", "l1")),
    "gpt2, goa": ("gpt2", ("--recipe", "goa")),
    "phi3, l1": ("phi3", ("--recipe", "l1")),
}


@pytest.mark.parametrize("case", ADVISED)
def test_advice_about_a_budget_can_be_followed(
    case: str, cli: Callable[..., Any], tiny_folder: Callable[..., Path]
) -> None:
    name, options = ADVISED[case]
    command = ("prune", tiny_folder(name), "unused", *options, "--dry-run")
    refusals = 0
    for sparsity in ("0.000001", "0.01", "0.05", "0.1", "0.2", "0.35", "0.5", "0.65", "0.8", "0.99"):
        ran = cli(*command, "--sparsity", sparsity)
        if ran.code == 0:
            continue
        refusals += 1
        line = error_of(ran)
        advised = re.findall(r"0\.\d+", re.split(r"[Aa]sk for|nearest", line)[-1])
        assert advised, f"no share is advised: {line}"
        for share in advised:
            again = cli(*command, "--sparsity", share)
            assert again.code == 0, f"{sparsity}: {line} -- then {share}: {again.err}"
    assert refusals > 0


def test_no_site_left(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    refused(
        "prune", tiny_folder("llama"), tmp_path / "out", *L1, "--blocks", "5:9", says=("no site", "5:9", "--blocks")
    )


@pytest.mark.parametrize("options", [("--blocks", "1:"), ("--allocator", "per-module", "--multiple-of", "1")])
def test_uneven_widths_need_their_own_loader(
    options: tuple[str, ...], refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", "0.27")
    refused(*command, *options, says=("units of (ffn|attention)", "--per-block"))


# Texts.


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.txt", b"", ("no text",)),
        ("blank.txt", b" \n\t\n", ("no text",)),
        ("binary.txt", b"some text" + bytes(4) + b"more", ("binary", "9")),
        ("latin.txt", "na\u00efve caf\u00e9".encode("latin-1"), ("not UTF-8", "byte 2 of 10")),
        ("short.txt", b"twelve bytes", (r"1[24] tokens", "32", "8 windows")),
        ("broken.jsonl", b'{"text": "one"}\n\n{"text": "two"\n', (r"broken\.jsonl, line 3", "JSON")),
        ("list.jsonl", b'{"text": "one"}\n["two"]\n', (r"line 2", "object", "list")),
        ("field.jsonl", b'{"text": "one"}\n{"words": "two"}\n', (r"line 2", "text", "sentence")),
        ("number.jsonl", b'{"text": 1}\n', (r"line 1", "text", "sentence")),
        ("empty.jsonl", b"\n\n", ("no text",)),
    ],
)
def test_text_that_is_none(
    name: str,
    content: bytes,
    says: tuple[str, ...],
    refused: Callable[..., str],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    text = tmp_path / name
    text.write_bytes(content)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", *SMALL, "--text", text)
    refused(*command, says=says)


def test_text_file_that_is_missing(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", *SMALL)
    refused(*command, "--text", tmp_path / "none.txt", says=(r"none\.txt", "No such file"))
    refused("evaluate", tiny_folder("llama"), "--text", tmp_path / "none.txt", says=(r"none\.txt", "No such file"))


def test_folder_without_text(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG")
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", *SMALL)
    refused(*command, "--text", tmp_path / "texts", says=("texts", r"\.jsonl, \.md, \.txt"))


def test_no_text(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3")
    refused(*command, says=("best-uniform", "--text", "--self-generated"))
    said = refused("calibrate", tiny_folder("llama"), tmp_path / "seen", "--recipe", "obs", says=("obs", "--text FILE"))
    assert "self-generated" not in said


def test_text_and_self_generated(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--text", text_file)
    refused(*command, "--self-generated", says=("--text", "self-generated"))


def test_encoder_cannot_write_its_own_text(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("bert"), tmp_path / "out", "--sparsity", "0.1", *SMALL, "--self-generated")
    refused(*command, says=("BertModel", "--text"))


def test_fewer_tokens_than_a_refit_has_channels(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--text", text_file)
    says = ("32 calibration tokens", "48 channels", "--reconstruction none")
    refused(*command, "--samples", "2", "--length", "16", "--recipe", "goa-budget", says=says)


def test_length_above_the_positions_of_the_model(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--length", "256")
    refused(*command, "--text", text_file, says=("256", "128 positions"))
    refused(*command, "--self-generated", says=("256", "128 positions"))
    evaluate = ("evaluate", tiny_folder("llama"), "--text", text_file, "--length", "256")
    refused(*evaluate, says=("256", "128 positions"))


@pytest.mark.parametrize("recipe", ["goa-budget", "obs"])
def test_too_few_tokens_for_a_least_squares_solve(
    recipe: str, refused: Callable[..., str], cli: Callable[..., Any], tiny_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", recipe, "--sparsity", "0.3")
    size = ("--multiple-of", "1", "--samples", "1", "--length", "16", "--text", text_file)
    refused(*command, *size, says=("cannot determine a refit of", "tokens are needed", "--reconstruction none"))
    assert cli(*command, *size, "--reconstruction", "bias", "--held-out", "0").code == 0


# Recipes.


def test_unknown_recipe(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--recipe")
    refused(*command, "goa-bugdet", says=("unknown recipe 'goa-bugdet'", "Did you mean 'goa-budget'", r"\.toml"))
    refused(*command, tmp_path / "none.toml", says=("no recipe file", r"none\.toml"))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--criterion", "second-momet", ("criterion", "Did you mean 'second-moment'", "wanda-sp")),
        ("--allocator", "unifrom", ("allocator", "Did you mean 'uniform'", "per-module")),
        ("--reconstruction", "two-steps", ("reconstruction", "Did you mean 'two-step'", "none")),
        ("--dtype", "float23", ("dtype", "Did you mean 'float32'", "bfloat16")),
        ("--unit", "quer", ("unit", "Did you mean 'query'", "group")),
        ("--of", "block", ("Did you mean 'blocks'", "model")),
        ("--sites", "atention", ("sites", "attention", "ffn", "atention")),
        ("--blocks", "four:", ("blocks", "4:-2", "four:")),
        ("--blocks", "3", ("blocks", "4:-2", "'3'")),
        ("--samples", "0", ("samples", "at least 1", "got 0")),
        ("--length", "7", ("length", "at least 8", "got 7")),
        ("--multiple-of", "-1", ("multiple_of", "at least 0", "got -1")),
        ("--ridge", "-1", ("ridge", "got -1")),
        ("--ridge", "nan", ("ridge", "got nan")),
        ("--attention-share", "inf", ("attention_share", "got inf")),
    ],
)
def test_option_of_a_wrong_value(
    option: str,
    value: str,
    says: tuple[str, ...],
    refused: Callable[..., str],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    refused("prune", tiny_folder("llama"), tmp_path / "out", *L1, option, value, says=says)


def test_inspect_of_an_unknown_unit(refused: Callable[..., str], tiny_folder: Callable[..., Path]) -> None:
    refused("inspect", tiny_folder("llama"), "--unit", "heads", says=("unit", "heads", "group", "query"))


def test_heads_compared_where_there_are_none(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", *SMALL, "--text", text_file)
    refused(*command, "--criterion", "head-similarity", says=("'head-similarity'", "ffn"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("sparsity = = 3", ("not valid TOML", "line 1")),
        ("\x00", ("not valid TOML",)),
        ("sparsty = 0.3", ("unknown key 'sparsty'", "Did you mean 'sparsity'")),
        ('samples = "many"', ("samples must be a whole number", "'many'")),
        ("samples = 8.5", ("samples must be a whole number", "8.5")),
        ("samples = true", ("samples must be a whole number", "True")),
        ('ridge = "small"', ("ridge must be a number", "'small'")),
        ("per_block = 1", ("per_block must be true or false", "1")),
        ("allocator = 5", ("allocator must be a string", "5")),
        ('sites = "ffn"', ("sites must be a list of strings", "'ffn'")),
        ('sites = ["ffn", 3]', ("sites must be a list of strings", "3")),
        ("sites = []", ("sites", "none")),
        ("seed = 1979-05-27", ("seed must be a whole number",)),
        ("ffn = 5", (r"\[ffn\] must be a table with a criterion", "5")),
        ("[ffn]\ntau = 1", (r"\[ffn\] must be a table with a criterion", "tau")),
        ("[ffn]\ncriterion = 5", (r"\[ffn\] must be a table with a criterion",)),
        ('[ffn]\ncriterion = "wanda"', ("unknown criterion 'wanda'", "Did you mean 'wanda-sp'")),
        ('[ffn]\ncriterion = "second-moment"\nfrom = "exact"', ("no option 'from'", "Did you mean 'form'", "gated")),
        ('[ffn]\ncriterion = "l1"\ntau = 0.1', ("'l1'", "no option 'tau'", "no options")),
        ('[ffn]\ncriterion = "second-moment"\nform = 5', ("form must be a string", "5")),
        ('[ffn]\ncriterion = "second-moment"\nform = "exakt"', ("form", "exact", "gaussian", "'exakt'")),
        ('[attention]\ncriterion = "head-similarity"\ntau = "low"', ("tau must be a number", "'low'")),
        ('[attention]\ncriterion = "head-similarity"\nrule = "new"', ("rule", "repaired", "printed", "'new'")),
        ('[attention]\ncriterion = "head-similarity"\nform = "new"', ("form", "exact", "gaussian", "'new'")),
        ('order = "one-shot"\nreconstruction = "two-step"', ("one-shot", "refit", "sequential")),
        ("ridge = 1" + 400 * "0", ("ridge must be at most 9,223,", "401 digits")),
        ("held_out = 0.7", ("held_out must be in", "0.7")),
        ("dense_share = -1.0", ("dense_share must be in", "-1")),
        ('allocator = "sensitivity"\nper_block = true', ("held_out must be above 0",)),
        ('allocator = "global"', ("per_block", "'uniform'")),
        ('order = "oneshot"', ("order", "Did you mean 'one-shot'")),
        ('covariance_text = "random"', ("covariance_text", "Did you mean 'random-tokens'")),
        ('calibration = "self"', ("calibration", "text", "self-generated")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_recipe_file_that_is_wrong(
    content: str,
    says: tuple[str, ...],
    refused: Callable[..., str],
    tiny_folder: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
    without_type_checks: None,
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(content)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--recipe", recipe)
    refused(*command, *SMALL[2:], "--text", text_file, says=says)


def test_recipe_file_that_is_no_text(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(b"\xff\xfe\x00name")
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--recipe", recipe)
    refused(*command, says=(r"mine\.toml", "TOML"))


# Where to write.


def test_out_exists(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refused("prune", tiny_folder("llama"), out, *L1, says=("out exists", "--force"))


def test_out_is_a_file(refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    refused("prune", tiny_folder("llama"), out, *L1, "--force", says=("is a file",))


def test_parent_of_out_is_missing(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    refused("prune", tiny_folder("llama"), tmp_path / "none" / "out", *L1, says=("none does not exist", "first"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_parent_of_out_cannot_be_written(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    refused("prune", tiny_folder("llama"), locked / "out", *L1, says=("locked cannot be written to",))


def test_disk_that_is_full(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(shutil.disk_usage(tmp_path))(10**6, 10**6 - 5, 5)
    monkeypatch.setattr("prunelm.writing.shutil.disk_usage", lambda _path: full)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", *L1)
    refused(*command, says=(r"out: about \d{3},\d{3} bytes are needed, 5 are free",))


def test_out_is_refused_before_any_work(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    refused("prune", "/no/such", tmp_path / "out", *L1, says=("out exists",))
    refused("demo", tmp_path / "out", says=("out exists",))


def test_failing_run_with_force_leaves_the_old_folder(
    refused: Callable[..., str], copied: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    model = copied()

    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] = torch.nan

    refused("prune", model, out, *L1, "--blocks", "5:9", "--force", says=("no site",))
    edit_weights(model, damage)
    refused("prune", model, out, *L1, "--force", says=("not finite", "nothing was written"))
    assert (out / "precious.txt").read_text() == "mine"


def test_force_replaces_what_is_there(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    ran = cli("prune", tiny_folder("llama"), out, *L1, "--force")
    assert ran.code == 0, ran
    assert (out / "config.json").is_file()
    assert not (out / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Weights that are not finite.


@pytest.mark.parametrize(
    ("recipe", "name", "value"),
    [
        ("goa-budget", "input_layernorm", torch.nan),
        ("goa-budget", "self_attn.q_proj", torch.nan),
        ("goa-budget", "self_attn.o_proj", torch.nan),
        ("goa-budget", "mlp.up_proj", torch.inf),
        ("goa-budget", "mlp.down_proj", torch.nan),
        ("goa", "self_attn.k_proj", torch.nan),
        ("goa", "mlp.down_proj", torch.inf),
        ("wanda-sp", "self_attn.v_proj", torch.nan),
        ("wanda-sp", "mlp.down_proj", torch.nan),
        ("l1", "mlp.gate_proj", torch.nan),
    ],
)
def test_non_finite_weights_are_named_by_block(
    recipe: str,
    name: str,
    value: float,
    refused: Callable[..., str],
    copied: Callable[..., Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights[f"model.layers.1.{name}.weight"].view(-1)[3] = value

    model = copied()
    edit_weights(model, damage)
    command = ("prune", model, tmp_path / "out", "--recipe", recipe, "--sparsity", "0.4", *SMALL)
    refused(*command, "--text", text_file, says=("block 1",))


# Evaluation.


def test_models_of_different_vocabularies(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    other = tiny_folder("llama", vocab_size=320)
    size = ("--text", text_file, "--length", "32", "--max-tokens", "64")
    refused("evaluate", tiny_folder("llama"), "--against", other, *size, says=("cannot be compared", "300", "320"))
    refused("compare", tiny_folder("llama"), other, *size, says=("cannot be compared", "300", "320"))


def test_models_of_different_tasks(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    command = ("evaluate", tiny_folder("llama"), "--against", tiny_folder("bert"), "--text", text_file)
    refused(*command, "--length", "32", "--max-tokens", "64", says=("cannot be compared",))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("lines.txt", "one line\n", (r"lines\.txt, line 1",)),
        ("none.jsonl", '{"sentence": "good", "label": 1}\n{"sentence": "bad"}\n', (r"line 2", "'label'")),
        ("word.jsonl", '{"sentence": "good", "label": "positive"}\n', (r"line 1", "'label'")),
    ],
)
def test_classifier_on_text_without_labels(
    name: str,
    content: str,
    says: tuple[str, ...],
    refused: Callable[..., str],
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    (tmp_path / name).write_text(content)
    model = tiny_folder("bert", model_class="BertForSequenceClassification")
    refused("evaluate", model, "--text", tmp_path / name, says=says)


def test_encoder_without_a_head_alone(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    refused("evaluate", tiny_folder("bert"), "--text", text_file, says=("BertModel", "--against"))


def test_text_that_fills_no_evaluation_window(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("twelve bytes")
    command = ("evaluate", tiny_folder("llama"), "--text", tmp_path / "short.txt", "--length", "32")
    refused(*command, says=("12 tokens", "32", "--length"))
    command = ("evaluate", tiny_folder("llama"), "--text", text_file, "--length", "32", "--max-tokens", "20")
    refused(*command, says=("20 tokens", "32"))


def test_evaluation_of_non_finite_weights(
    refused: Callable[..., str], copied: Callable[..., Path], text_file: Path
) -> None:
    def damage(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][0] = torch.nan

    model = copied()
    edit_weights(model, damage)
    command = ("evaluate", model, "--text", text_file, "--length", "32", "--max-tokens", "128")
    refused(*command, says=("4 of 4 windows", "first window 0"))


# What PruneLM itself wrote, damaged later.


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"format": 99}, ("99", "reads 1", "prunelm")),
        ({"format": None}, ("None", "reads 1")),
        ({"format": "1"}, ("'1'", "reads 1")),
        ({"widths": []}, (r"pruning\.json",)),
        ({"widths": {"0.ffn": 5}}, ()),
        ({"widths": {"0.ffn": {"units": "many"}}}, ()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_damaged_pruning_file(
    command: str,
    edit: dict[str, Any],
    says: tuple[str, ...],
    per_block: Path,
    refused: Callable[..., str],
    text_file: Path,
    tmp_path: Path,
    without_type_checks: None,
) -> None:
    model = Path(shutil.copytree(per_block, tmp_path / "model"))
    edit_json(model / "pruning.json", **edit)
    options = ("--text", text_file, "--length", "32", "--max-tokens", "64") if command == "evaluate" else ()
    refused(command, model, *options, says=says)


def test_pruning_file_of_other_weights(
    per_block: Path, refused: Callable[..., str], text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(per_block, tmp_path / "model"))
    widths = json.loads((model / "pruning.json").read_text())["widths"]
    assert widths["0.ffn"]["units"] > 1
    for units in (widths["0.ffn"]["units"] - 1, 0, -3, 10**6):
        edit_json(model / "pruning.json", widths={**widths, "0.ffn": {"units": units}})
        refused("evaluate", model, "--text", text_file, "--length", "32", says=("model",))
    edit_json(model / "pruning.json", widths={})
    refused("evaluate", model, "--text", text_file, "--length", "32", says=("model",))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_pruning_file_that_is_none(
    content: str, per_block: Path, refused: Callable[..., str], text_file: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(per_block, tmp_path / "model"))
    (model / "pruning.json").write_text(content)
    refused("evaluate", model, "--text", text_file, "--length", "32", says=(r"pruning\.json",))


# Interruption.


def wait_until(condition: Callable[[], bool], process: forked.Running) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.code is None, process.err
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("stage", "number"),
    [("pruning", signal.SIGINT), ("pruning", signal.SIGTERM), ("proving", signal.SIGINT)],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_interrupted(
    stage: str, number: signal.Signals, tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out, heard = tmp_path / "out", tmp_path / "heard"
    heard.mkdir()
    command = ["prune", tiny_folder("llama"), out, "--sparsity", "0.3"]
    if stage == "pruning":
        text = tmp_path / "long.txt"
        text.write_text(text_file.read_text() * 20)
        command += ["--text", text, "--samples", "6000", "--length", "128"]
    else:
        out.mkdir()
        (out / "precious.txt").write_text("mine")
        command += ["--recipe", "l1", "--force"]
    before = {path: what for path, what in tree(tmp_path).items() if Path(path).parts[0] != heard.name}
    process = forked.start(heard, "-m", "prunelm", *map(str, command))
    try:
        # The recipe is said once everything is imported; the partial folder stands while the result is proven.
        wait_until(lambda: process.err.startswith("recipe: "), process)
        if stage == "pruning":
            time.sleep(1)
        else:
            wait_until(lambda: (tmp_path / ".out.partial").is_dir(), process)
        process.send_signal(number)
        code = process.wait()
    finally:
        process.process.kill()
    lines, stdout = process.err.splitlines(), process.out
    shutil.rmtree(heard)
    assert tree(tmp_path) == before
    assert stdout == ""
    how = "interrupted" if number == signal.SIGINT else "ended by SIGTERM"
    assert lines[1:] == [f"error: {how}; nothing was left half-written"], lines
    assert code == 128 + number


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--held-out-text", "nowhere.txt"), "--held-out-text nowhere.txt is what --max-ppl is measured on"),
        (("--scratch-dtype", "float16"), "--scratch-dtype and --statistics-dtype belong to --stream"),
        (("--statistics-dtype", "float32"), "belong to --stream, which makes one size"),
    ],
)
def test_nothing_said_of_one_size_is_ignored_for_several(
    option: tuple[str, str], says: str, refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.2,0.4", "--recipe", "l1")
    refused(*command, *option, says=(says,))


def test_nothing_said_of_parts_is_ignored_without_any(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    command = ("evaluate", tiny_folder("llama"), "--text", text_file, "--batch-size", "4", "--limit", "3")
    refused(*command, says=("--batch-size, --limit: for parts of the suite, and none is asked for",))


def test_a_dry_run_is_on_the_device_that_is_named(
    refused: Callable[..., str], tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    refused("prune", tiny_folder("llama"), tmp_path / "out", *L1, "--dry-run", "--device", "bogus", says=("bogus",))
