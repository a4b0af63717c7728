"""The command on a report gives the very recipe that made the folder."""

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from prunelm.errors import PruneLMError
from prunelm.recipe import Recipe
from prunelm.report.command import as_toml, command

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
