"""The command on a report gives the very recipe that made the folder."""

import contextlib
import inspect
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import prunelm
from prunelm.errors import PruneLMError
from prunelm.recipe import Recipe
from prunelm.report.command import REPAIRED, as_toml, command, evaluations, transferred

CHANGES: list[dict[str, Any]] = [
    {},
    {"sparsity": 0.123456789, "samples": 7, "seed": 3},
    {"multiple_of": 8, "ridge": 0.25, "blocks": "1:-1"},
    {"sites": ["ffn"], "bias": True},
    {"criterion": "l2"},
    {"per_block": True, "allocator": "per-module"},
    {"attention_share": 0.5, "length": 96, "unit": "query"},
    {"exchanges": 3},
    {"similarity_rows": 9, "rounds": 0},
]


def asked_for(line: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, Any]:
    """The recipe that the command line resolves, as it says it before it starts to work."""
    from prunelm import cli

    monkeypatch.chdir(folder)
    said = io.StringIO()
    monkeypatch.setattr(cli.err, "_file", said)  # `file` would be put back as the stream of that moment
    with contextlib.suppress(PruneLMError):
        cli.app(shlex.split(line)[1:], prog_name="prunelm", standalone_mode=False)
    found = next(text for text in said.getvalue().splitlines() if text.startswith("recipe: "))
    return dict(json.loads(found.removeprefix("recipe: ")))


@pytest.mark.parametrize("name", ["goa-budget", "best", "goa-data-free", "osp", "taylor-first"])
def test_the_command_resolves_to_the_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = 0
    for change in CHANGES:
        for evened in (False, True):
            try:
                recipe = Recipe.load(name, **change)
                recipe = recipe.evened() if evened else recipe
            except PruneLMError:
                continue
            data = json.loads(json.dumps(recipe.to_dict()))
            pruning = {"recipe": data, "base_model": "no such model", "calibration": {"criterion": {"source": "a b"}}}
            line, saved = command(pruning)
            if saved:
                (tmp_path / "recipe.toml").write_text(as_toml(data))
            found = asked_for(line, monkeypatch, tmp_path)
            assert {**found, "name": ""} == {**data, "name": ""}, line
            tried += 1
    assert tried >= 5


def test_a_recipe_of_an_older_version_and_of_a_newer_one() -> None:
    data = json.loads(json.dumps(Recipe.load("l2", sparsity=0.3).to_dict()))
    pruning = {"recipe": data, "base_model": "M", "calibration": {"criterion": {"source": "none needed"}}}
    said = ("prunelm prune M OUT --sparsity 0.3 --recipe l2", False)
    assert command(pruning) == said
    del data["tensor_parallel"], data["exchanges"]
    assert command(pruning) == said
    data["not_known_yet"] = 1
    assert command(pruning) == ("prunelm prune M OUT --sparsity 0.3 --recipe recipe.toml", True)


def test_the_data_type_of_the_work_is_said() -> None:
    data = json.loads(json.dumps(Recipe.load("l2", sparsity=0.3).to_dict()))
    pruning = {"recipe": data, "base_model": "M", "calibration": {"criterion": {"source": "none needed"}}}
    said = ("prunelm prune M OUT --sparsity 0.3 --recipe l2 --compute-dtype bfloat16", False)
    assert command({**pruning, "compute_dtype": "bfloat16"}) == said
    line, _ = command({**pruning, "dtype": "float16", "statistics_dtype": "float32"})
    assert line == "prunelm prune M OUT --sparsity 0.3 --recipe l2 --stream --dtype float16 --statistics-dtype float32"


def test_a_member_of_a_family_and_a_saved_calibration_are_said() -> None:
    recipe = json.loads(json.dumps(Recipe.load("obs", sparsity=0.4).to_dict()))
    pruning = {"recipe": recipe, "base_model": "M", "calibration": {"criterion": {"source": "a.txt"}}}
    asked: dict[str, Any] = {"sparsities": [0.2, 0.4]}
    line = "prunelm prune M OUT --sparsity 0.2,0.4 --recipe obs --text a.txt"
    assert command({**pruning, "asked": asked}) == (line, False)
    asked["calibrated"] = "SEEN IT"
    line = "prunelm prune M OUT --sparsity 0.2,0.4 --calibrated 'SEEN IT' --text a.txt"
    assert command({**pruning, "asked": asked}) == (line, False)


def test_a_repaired_model_says_how_it_was_repaired() -> None:
    recipe = json.loads(json.dumps(Recipe.from_dict({"name": "repair", "bias": False, **REPAIRED}).to_dict()))
    pruning = {"recipe": recipe, "base_model": "M", "calibration": {"criterion": {"source": "a.txt"}}}
    assert command(pruning) == ("prunelm repair M PRUNED OUT --text a.txt", False)
    recipe |= {"bias": True, "ridge": 0.5, "samples": 7}
    assert command(pruning) == ("prunelm repair M PRUNED OUT --text a.txt --ridge 0.5 --bias --samples 7", False)


def test_the_options_of_repair_are_what_it_does_without_them() -> None:
    usual = {name: found.default for name, found in inspect.signature(prunelm.repair).parameters.items()}
    usual["bias"] = bool(usual["bias"])  # by default where PRUNED has biases; the recipe says what came of that
    assert {name: usual[name] for name in REPAIRED} == REPAIRED


def test_the_recipe_of_a_model_is_transferred_with_its_settings() -> None:
    recipe = json.loads(json.dumps(Recipe.load("obs", sparsity=0.4, samples=16, length=64, seed=3).to_dict()))
    words = "--recipe obs --sparsity 0.4 --samples 16 --calibration-length 64 --seed 3"
    assert " ".join(transferred({"recipe": recipe})) == words
    recipe["ridge"] = 0.5
    assert " ".join(transferred({"recipe": recipe})) == "--recipe recipe.toml --sparsity 0.4"


def test_the_commands_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of one text and of settings that agree share a command, which asks for those very settings."""
    from prunelm import cli

    windows = {"length": 64, "max_tokens": 512, "batch_size": 1, "seed": 3, "dtype": "float32"}
    texts = [{"name": name, "sha256": name} for name in ("a b.txt", "c.txt")]
    parts: dict[str, Any] = {
        "quality": {"settings": windows, "text": texts[0]},
        "generation": {"settings": {"prompts": 3, "new_tokens": 48, "dtype": "float32"}, "text": texts[0]},
        "noise": {"settings": windows, "text": texts[1]},
        "shift": {"settings": {**windows, "seed": 4}, "text": texts[0], "others": [{"name": "d.txt", "sha256": "d"}]},
        "tasks": {"settings": {"tasks": ["one", "two"], "limit": 5, "batch_size": 1, "seed": 4, "dtype": "float32"}},
        "speed": {"settings": {"rounds": 2, "dtype": "float32"}},
    }
    lines = evaluations({"parts": parts, "against": {"name": "M"}}, "OUT", "M")
    start, end = "prunelm evaluate OUT --text", "--out OUT/evaluation.json"
    assert lines == [
        f"{start} 'a b.txt' --against M --parts quality,generation,speed --length 64 --max-tokens 512 --seed 3 "
        f"--prompts 3 --rounds 2 {end}",
        f"{start} c.txt --against M --parts noise --length 64 --max-tokens 512 --seed 3 {end}",
        f"{start} 'a b.txt' --against M --parts shift,tasks --others d.txt --length 64 --max-tokens 512 --seed 4 "
        f"--limit 5 --tasks one,two {end}",
    ]
    asked: list[dict[str, Any]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "prunelm.suite.measuring.measure",
        lambda *_args, **options: asked.append(options) or {"parts": {}, "against": None},
    )
    for line in lines:
        cli.app(shlex.split(line)[1:], prog_name="prunelm", standalone_mode=False)
    assert [options["parts"] for options in asked][2] == ["shift", "tasks"]
    assert (asked[0]["setting"].prompts, asked[0]["setting"].rounds, asked[0]["setting"].seed) == (3, 2, 3)
    assert (asked[2]["setting"].tasks, asked[2]["setting"].others) == (("one", "two"), ("d.txt",))
    (plain,) = evaluations({"parts": {"memory": parts["speed"]}}, "OUT", "M")
    assert plain == "prunelm evaluate OUT --text ANY_TEXT --parts memory --rounds 2 --out OUT/evaluation.json"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"plan": "my plan.json", "params": "1B"}, "--plan 'my plan.json' --text t.txt"),
        ({"params": "1B"}, "--params 1B --recipe l2 --text t.txt"),
        ({"speedup": "1.5@decode"}, "--speedup 1.5@decode --recipe l2 --text t.txt"),
        ({"max_ppl": "+5%", "text": "the last tenth of t.txt"}, "--max-ppl +5% --recipe l2 --text t.txt"),
        ({"max_ppl": "9", "text": "h.txt"}, "--max-ppl 9 --held-out-text h.txt --recipe l2 --text t.txt"),
    ],
)
def test_a_budget_is_said_as_it_was(asked: dict[str, str], said: str) -> None:
    data = json.loads(json.dumps(Recipe.load("l2", sparsity=0.3).to_dict()))
    pruning = {"recipe": data, "base_model": "M", "calibration": {"criterion": {"source": "t.txt"}}, "asked": asked}
    assert command(pruning) == (f"prunelm prune M OUT {said}", False)
