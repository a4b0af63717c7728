"""Each command as a user meets it: what it prints, what it writes, and that the result opens elsewhere."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import forked
from transformers import LlamaForCausalLM

import prunelm
from prunelm.commands import console
from prunelm.commands.asked import recipe_asked
from prunelm.commands.compare import fitting_tables
from prunelm.errors import CheckpointError
from prunelm.testing import outputs, tiny_inputs

SMALL = ("--samples", "8", "--length", "32")
WINDOWS = ("--length", "32", "--max-tokens", "128")
ESCAPE = "\x1b"
KINDS = ("criteria", "allocators", "reconstructions", "architectures", "recipes")

LOAD_AND_SHOW = """
import sys, torch, {module}
model = {call}(sys.argv[1], dtype=torch.float32).eval()
ids = torch.arange(24)[None] % model.config.vocab_size
print(type(model).__module__, sum(p.numel() for p in model.parameters()), float(model(ids).logits.double().sum()))
assert "prunelm" not in sys.modules or "{module}" == "prunelm"
"""


def plain(text: str) -> str:
    """What a reader reads in a printed table: cells without borders, lines joined."""
    return " ".join(re.sub("[\u2500-\u257f]", " ", text).split())


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def uniform(
    run_cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path_factory: Any
) -> tuple[Path, Any]:
    """A folder that `prune` wrote with a quick recipe in a fresh process, and what that printed."""
    out = tmp_path_factory.mktemp("pruned") / "llama [small] :x:"
    quick = ("--sparsity", "0.4", "--recipe", "goa-budget")
    ran = run_cli("prune", tiny_folder("llama"), out, *quick, "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    return out, ran


# prune


def test_prune_says_what_it_does(uniform: tuple[Path, Any], tiny_folder: Callable[..., Path]) -> None:
    out, ran = uniform
    facts = read(out, "pruning.json")
    before = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny_folder("llama")).parameters())
    after = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(out).parameters())
    assert facts["parameters"]["before"] == before
    assert facts["parameters"]["after"] == after < before
    share = (before - after) / facts["parameters"]["prunable"]
    assert f"{before:,} -> {after:,} parameters: {share:.2%} of the blocks" in ran.out
    assert "AutoModelForCausalLM.from_pretrained" in ran.out
    recipe = re.fullmatch(r"recipe: (\{.*\})\n", ran.err)
    assert recipe, ran.err
    assert json.loads(recipe[1]) == facts["recipe"]
    assert facts["recipe"]["name"] == "goa-budget"
    assert facts["recipe"]["sparsity"] == 0.4


def test_prune_prints_the_folder_as_it_is_called(uniform: tuple[Path, Any]) -> None:
    out, ran = uniform
    assert f"{out}: loaded in a fresh process" in ran.out


def test_prune_writes_a_complete_folder(uniform: tuple[Path, Any]) -> None:
    out, _ = uniform
    names = {path.name for path in out.iterdir()}
    wanted = {"config.json", "model.safetensors", "pruning.json", "README.md", "tokenizer.json"}
    assert wanted <= names
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert not any(name.startswith(".") for name in names)


def test_tokenizer_files_are_copied_byte_for_byte(uniform: tuple[Path, Any], tiny_folder: Callable[..., Path]) -> None:
    out, _ = uniform
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (tiny_folder("llama") / name).read_bytes()


def test_uniform_result_loads_with_transformers_alone(uniform: tuple[Path, Any], tiny_folder: Any) -> None:
    out, _ = uniform
    assert read(out, "pruning.json")["loader"] == "transformers"
    module, parameters, total = show(out, "transformers", "transformers.AutoModelForCausalLM.from_pretrained")
    assert module.startswith("transformers.")
    assert parameters == read(out, "pruning.json")["parameters"]["after"]
    assert total == pytest.approx(sum_of_logits(prunelm.load(out)), abs=1e-2)
    assert abs(total - sum_of_logits(prunelm.load(tiny_folder("llama")))) > 1


def test_per_block_result_loads_with_prunelm(per_block: Path) -> None:
    facts = read(per_block, "pruning.json")
    assert facts["loader"] == "prunelm"
    assert len({len(site["kept"]) for key, site in facts["sites"].items() if key.endswith("ffn")}) == 2
    _, parameters, total = show(per_block, "prunelm", "prunelm.load")
    assert parameters == facts["parameters"]["after"]
    assert math.isfinite(total)


def show(folder: Path, module: str, call: str) -> tuple[str, int, float]:
    """What a fresh process finds in a folder: the module of its class, its parameters, the sum of some logits."""
    script = LOAD_AND_SHOW.format(module=module, call=call)
    done = forked.run("-c", script, str(folder))
    assert done.returncode == 0, done.stderr
    name, parameters, total = done.stdout.split()
    return name, int(parameters), float(total)


def sum_of_logits(model: Any) -> float:
    with torch.no_grad():
        return float(model(torch.arange(24)[None] % model.config.vocab_size).logits.double().sum())


def test_pruning_again_gives_the_same_bytes(
    uniform: tuple[Path, Any], cli: Callable[..., Any], tiny_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    first, _ = uniform
    second = tmp_path / "elsewhere"
    ran = cli(
        "prune",
        tiny_folder("llama"),
        second,
        "--recipe",
        "goa-budget",
        "--sparsity",
        "0.4",
        "--text",
        text_file,
        *SMALL,
        "--json",
    )
    assert ran.code == 0, ran
    printed = json.loads(ran.out)
    assert printed.pop("out") == str(second)
    assert printed.pop("seconds") > 0
    assert printed == read(second, "pruning.json")
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_several_sizes_from_one_calibration(
    cli: Callable[..., Any], tiny_folder: Any, text_file: Path, tmp_path: Path
) -> None:
    command = ("prune", tiny_folder("llama"), tmp_path / "sizes", "--sparsity", "0.4,0.2", "--recipe", "obs")
    ran = cli(*command, "--multiple-of", "1", "--samples", "16", "--length", "32", "--text", text_file)
    assert ran.code == 0, ran
    assert '"sparsity": [0.2, 0.4]' in ran.err
    kept = []
    for name in ("0.2", "0.4"):
        folder = tmp_path / "sizes" / name
        assert f"{folder}: loaded in a fresh process, same logits" in ran.out
        facts = read(folder, "pruning.json")
        assert facts["recipe"]["sparsity"] == float(name)
        assert LlamaForCausalLM.from_pretrained(folder).config.intermediate_size == len(facts["sites"]["0.ffn"]["kept"])
        kept.append({key: set(site["kept"]) for key, site in facts["sites"].items()})
    assert all(kept[1][key] <= kept[0][key] for key in kept[0])
    again = cli(*command, "--text", text_file, "--dry-run", "--json")
    assert [row["recipe"]["sparsity"] for row in json.loads(again.out)] == [0.2, 0.4]


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing_and_foretells(
    as_json: bool, uniform: tuple[Path, Any], cli: Callable[..., Any], tiny_folder: Any, tmp_path: Path
) -> None:
    options = ("--sparsity", "0.4", "--recipe", "goa-budget", "--dry-run", *(["--json"] if as_json else []))
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", *options)
    assert ran.code == 0, ran
    assert list(tmp_path.iterdir()) == []
    sizes = read(uniform[0], "pruning.json")["parameters"]
    if as_json:
        row = json.loads(ran.out)
        assert row["parameters"] == sizes["after"]
        assert row["removed"] == sizes["before"] - sizes["after"]
        assert row["share_of_blocks"] == pytest.approx(sizes["share_of_blocks"], abs=1e-6)
        assert row["recipe"]["sparsity"] == 0.4
    else:
        assert f"{sizes['after']:,}" in ran.out
        assert "Nothing was written" in ran.out


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "best-uniform"),
        ({"per_block": True}, "best"),
        ({"looks": False}, "obs"),
        ({"allocator": "uniform"}, "obs"),
        ({"per_block": True, "allocator": "per-module"}, "obs"),
        ({"attention_share": 0.5}, "obs"),
    ],
)
def test_the_default_recipe_is_the_best_that_other_options_leave(options: dict[str, Any], name: str) -> None:
    left = {"sites": None, "targets": None, **options}
    assert recipe_asked(None, None, uniform=False, **left).name == name
    assert recipe_asked("l1", None, uniform=False, **left).name == "l1"


def test_evened_recipes_divide_over_both_kinds_of_site_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('allocator = "fisher"\nper_block = true\nheld_out = 0.1\nsites = ["ffn"]\n')
    for name, sites, found in (
        ("best", None, ("attention", "ffn")),
        ("best", "ffn", ("ffn",)),
        (str(tmp_path / "mine.toml"), None, ("ffn",)),
    ):
        assert recipe_asked(name, None, uniform=True, sites=sites, targets=None).sites == found


def test_the_default_recipe_prunes_into_a_stock_folder(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.4", "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    assert "plans tried on" in ran.err
    facts = read(tmp_path / "out", "pruning.json")
    assert (facts["recipe"]["name"], facts["loader"]) == ("best-uniform", "transformers")


def test_dry_run_reads_no_weight(cli: Callable[..., Any], tiny_folder: Any, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    weights = (model / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    (model / "model.safetensors").write_bytes(weights[:header] + b"\xff" * (len(weights) - header))
    ran = cli("prune", model, tmp_path / "out", "--sparsity", "0.4", "--dry-run")
    assert ran.code == 0, ran


def test_heads_that_stay_are_noted(cli: Callable[..., Any], tiny_folder: Any, tmp_path: Path) -> None:
    ran = cli("prune", tiny_folder("gpt2"), tmp_path / "out", "--sparsity", "0.2", "--dry-run")
    assert ran.code == 0, ran
    assert re.match(r"note: gpt2: .*attention stays.*--per-block", ran.err)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_dtype_of_the_written_weights(name: str, cli: Callable[..., Any], tiny_folder: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "l1", "--sparsity", "0.4")
    ran = cli(*command, "--dtype", name)
    assert ran.code == 0, ran
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, name)
    }
    assert read(tmp_path / "out", "config.json")["dtype"] == name
    assert read(tmp_path / "out", "pruning.json")["dtype"] == name


# inspect


def test_inspect(cli: Callable[..., Any], tiny_folder: Any) -> None:
    ran = cli("inspect", tiny_folder("llama"))
    assert ran.code == 0, ran
    assert ran.err == ""
    read_by_user = plain(ran.out)
    # A KV group: two query heads and one K and V head of 8 rows each, 48 wide, and 16 columns of o_proj.
    assert f"attention 2 3 {(16 + 8 + 8) * 48 + 16 * 48:,} yes" in read_by_user
    assert f"ffn 2 40 {3 * 48} yes" in read_by_user
    assert "0.1" in read_by_user
    assert "0.3" in read_by_user


def test_inspect_as_json(cli: Callable[..., Any], tiny_folder: Any) -> None:
    ran = cli("inspect", tiny_folder("gpt2"), "--json")
    assert ran.code == 0, ran
    assert ran.err == ""
    found = json.loads(ran.out)
    model = prunelm.load(tiny_folder("gpt2"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["model_type"] == "gpt2"
    assert found["blocks"] == 2
    assert [site["key"] for site in found["sites"]] == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    assert [site["stock"] for site in found["sites"]] == [False, True, False, True]
    assert found["prunable"] == sum(site["units"] * site["cost"] for site in found["sites"])
    assert [row["sparsity"] for row in found["budgets"]] == [0.1, 0.2, 0.3]
    for row in found["budgets"]:
        assert row["parameters"] == found["parameters"] - row["removed"]
        assert 0 < row["removed"] <= row["sparsity"] * found["prunable"]


def test_inspect_by_query_heads(cli: Callable[..., Any], tiny_folder: Any) -> None:
    found = json.loads(cli("inspect", tiny_folder("llama"), "--unit", "query", "--json").out)
    attention = [site for site in found["sites"] if site["key"].endswith("attention")]
    assert [site["units"] for site in attention] == [6, 6]
    assert [site["cost"] for site in attention] == [8 * 48 * 2] * 2


def test_inspect_of_a_pruned_model(cli: Callable[..., Any], uniform: tuple[Path, Any], per_block: Path) -> None:
    for folder in (uniform[0], per_block):
        facts = read(folder, "pruning.json")
        found = json.loads(cli("inspect", folder, "--json").out)
        assert found["parameters"] == facts["parameters"]["after"]
        assert {site["key"]: site["units"] for site in found["sites"]} == {
            key: len(site["kept"]) for key, site in facts["sites"].items()
        }


# evaluate and compare


def test_evaluate_as_json(cli: Callable[..., Any], tiny_folder: Any, text_file: Path) -> None:
    ran = cli("evaluate", tiny_folder("llama"), "--text", text_file, *WINDOWS, "--json")
    assert ran.code == 0, ran
    assert ran.err == ""
    found = json.loads(ran.out)
    assert found["metric"] == "perplexity"
    assert found["value"] > 1
    assert found["error"] > 0
    assert found["bits_per_byte"] > 0
    assert found["kl"] is found["top1"] is found["cosine"] is None
    assert found["facts"]["tokens"] == 128
    assert found["facts"]["sequences"] == 4
    assert found["facts"]["text"] == "words.txt"


def test_evaluate_against_the_dense_model(
    cli: Callable[..., Any], uniform: tuple[Path, Any], per_block: Path, tiny_folder: Any, text_file: Path
) -> None:
    dense = tiny_folder("llama")
    alone = json.loads(cli("evaluate", uniform[0], "--text", text_file, *WINDOWS, "--json").out)
    found = json.loads(cli("evaluate", uniform[0], "--against", dense, "--text", text_file, *WINDOWS, "--json").out)
    assert found["value"] == pytest.approx(alone["value"])
    assert found["kl"] > 1e-4
    assert 0 <= found["top1"] < 1
    uneven = json.loads(cli("evaluate", per_block, "--against", dense, "--text", text_file, *WINDOWS, "--json").out)
    assert uneven["kl"] > 1e-4
    itself = json.loads(cli("evaluate", dense, "--against", dense, "--text", text_file, *WINDOWS, "--json").out)
    assert itself["kl"] == pytest.approx(0, abs=1e-6)
    assert itself["top1"] == 1


def test_evaluate_as_a_table(cli: Callable[..., Any], tiny_folder: Any, text_file: Path) -> None:
    command = ("evaluate", tiny_folder("llama"), "--against", tiny_folder("llama"), "--text", text_file, *WINDOWS)
    ran = cli(*command)
    found = json.loads(cli(*command, "--json").out)
    assert ran.code == 0, ran
    read_by_user = plain(ran.out)
    assert f"perplexity {found['value']:.4g} +- {found['error']:.2g}" in read_by_user
    assert f"bits per byte {found['bits_per_byte']:.4f}" in read_by_user
    assert "same top token 100.0%" in read_by_user
    assert "tokens 128" in read_by_user


def test_compare_as_json(
    cli: Callable[..., Any], uniform: tuple[Path, Any], per_block: Path, tiny_folder: Any, text_file: Path
) -> None:
    models = (tiny_folder("llama"), uniform[0], per_block)
    ran = cli("compare", *models, "--text", text_file, *WINDOWS, "--json")
    assert ran.code == 0, ran
    rows = json.loads(ran.out)
    assert [row["model"] for row in rows] == [str(model) for model in models]
    for row, model in zip(rows, models, strict=True):
        assert row["parameters"] == sum(p.numel() for p in prunelm.load(model).parameters())
        assert row["bytes"] == (model / "model.safetensors").stat().st_size
        assert row["tokens_per_second"] > 0
        assert row["evaluation"]["facts"]["tokens"] == 128
    against = ("--against", models[0], "--text", text_file, *WINDOWS, "--json")
    assert json.loads(cli("evaluate", models[2], *against).out) == rows[2]["evaluation"]
    assert rows[0]["evaluation"]["kl"] is None
    assert all(row["evaluation"]["kl"] > 1e-4 for row in rows[1:])
    assert rows[0]["speedup"] == 1


def test_compare_as_a_table(cli: Callable[..., Any], uniform: tuple[Path, Any], tiny_folder: Any) -> None:
    ran = cli("compare", tiny_folder("llama"), uniform[0], "--quantized", "")
    assert ran.code == 0, ran
    assert f"{read(uniform[0], 'pruning.json')['parameters']['after']:,}" in ran.out
    assert "perplexity" not in ran.out
    assert "tokens/s" in ran.out


@pytest.mark.parametrize(("columns", "heads"), [(200, [6]), (80, [4, 3]), (20, [2] * 5)])
def test_models_that_have_no_room_stand_in_a_second_table(
    columns: int, heads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.out, "width", columns)
    size = {"bytes": 538_090_408, "tokens_per_second": 800.0, "speedup": 1.25}
    rows = [{"model": f"pruned-{k}", "parameters": 134_515_008 + k, **size} for k in range(6)]
    tables = list(fitting_tables(rows))
    assert [len(table.columns) - 1 for table in tables] == heads
    models = [str(column.header) for table in tables for column in table.columns[2:]]
    assert models == [row["model"] for row in rows[1:]]
    assert {str(table.columns[1].header) for table in tables} == {rows[0]["model"]}


# list and help


@pytest.mark.parametrize("kind", KINDS)
def test_list(kind: str, cli: Callable[..., Any]) -> None:
    rows = json.loads(cli("list", kind, "--json").out)
    assert rows
    ran = cli("list", kind)
    assert ran.code == 0, ran
    assert ran.err == ""
    for row in rows:
        assert row["name"]
        assert row["summary"].endswith((".", "only")), row
        assert row["origin"] == "prunelm"
        # Words may be wrapped inside a cell, but none may be missing.
        assert row["name"] in ran.out
        missing = set(row["summary"].split()) - set(plain(ran.out).split())
        assert not missing, f"{row['name']}: {missing} is in the JSON but not in the table"


def test_list_names_everything_that_a_recipe_may_name(cli: Callable[..., Any]) -> None:
    names = {kind: {row["name"] for row in json.loads(cli("list", kind, "--json").out)} for kind in KINDS}
    assert {"head-similarity", "l1", "l2", "random", "second-moment", "wanda-sp"} <= names["criteria"]
    assert {"uniform", "per-module"} <= names["allocators"]
    assert {"none", "two-step"} <= names["reconstructions"]
    assert {"llama", "gpt2", "bert", "gemma3_text"} <= names["architectures"]
    assert {"goa", "goa-budget", "goa-data-free", "l1"} <= names["recipes"]


def test_list_of_something_unknown(cli: Callable[..., Any]) -> None:
    ran = cli("list", "recipe")
    assert ran.code == 1
    assert ran.out == ""
    assert re.fullmatch(r"error: .*'recipe'.*Did you mean 'recipes'.*architectures.*\n", ran.err)


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, "-m", "prunelm", "--help"], capture_output=True, check=True)
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)
    assert min(times) < 0.5, times


def test_help_imports_no_framework() -> None:
    script = (
        "import sys, prunelm.cli\n"
        "sys.argv = ['prunelm', '--help']\n"
        "try:\n    prunelm.cli.main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "found = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)


@pytest.mark.parametrize("command", ["inspect", "prune", "evaluate", "compare", "list", "demo"])
def test_every_command_has_help(command: str, cli: Callable[..., Any]) -> None:
    ran = cli(command, "--help")
    assert ran.code == 0, ran
    assert ran.err == ""
    assert "Usage" in ran.out
    ran = cli(command, "--no-such-option")
    assert ran.code == 2
    assert ran.out == ""
    assert "No such option" in plain(ran.err)


# What goes where.


def test_stdout_and_stderr_without_a_terminal(
    forked_cli: Callable[..., Any], uniform: tuple[Path, Any], tiny_folder: Any, tmp_path: Path
) -> None:
    unseen = tmp_path / "unseen.txt"
    unseen.write_text(" ".join(f"{k} {k * k}" for k in range(100)))
    command = ("evaluate", uniform[0], "--against", tiny_folder("llama"), "--text", unseen, "--length", "32", "--json")
    ran = forked_cli(*command)
    assert ran.code == 0, ran
    assert ran.err == ""
    json.loads(ran.out)
    assert ESCAPE not in ran.out + uniform[1].out + uniform[1].err


def test_reader_that_leaves_early() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "prunelm", "list", "recipes", "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == ""


def test_debug_shows_the_traceback(cli: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="no such model: '/no/such/folder'"):
        cli("--debug", "inspect", "/no/such/folder")


def test_pruned_twice(cli: Callable[..., Any], uniform: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "twice"
    ran = cli("prune", uniform[0], out, "--recipe", "l1", "--sparsity", "0.3", "--multiple-of", "1")
    assert ran.code == 0, ran
    first, second = read(uniform[0], "pruning.json"), read(out, "pruning.json")
    assert second["parameters"]["before"] == first["parameters"]["after"]
    model = prunelm.load(out)
    assert sum(p.numel() for p in model.parameters()) == second["parameters"]["after"]
    assert outputs(model, tiny_inputs(model)).isfinite().all()
