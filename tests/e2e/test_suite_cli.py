"""`prunelm evaluate --parts` as a user meets it: the table, the file, the warning about calibration text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZE = ("--length", "32", "--max-tokens", "256")


@pytest.fixture(scope="module")
def pruned(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("suite") / "OUT"
    half = out.parent / "calibration.txt"
    half.write_text(text_file.read_text()[:20_000])
    small = ("--samples", "64", "--length", "128")
    ran = cli("prune", tiny_folder("llama"), out, "--sparsity", "0.3", "--text", half, *small)
    assert ran.code == 0, ran
    return out


def test_parts_are_measured_and_kept(
    cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    held_out = pruned.parent / "held-out.txt"
    held_out.write_text(text_file.read_text()[20_000:])
    out = pruned.parent / "evaluation.json"
    command = ("evaluate", pruned, "--text", held_out, "--against", tiny_folder("llama"), *SIZE, "--out", out)
    ran = cli(*command, "--parts", "quality,generation")
    assert ran.code == 0, ran
    for shown in ("perplexity", "bits per byte", "calibration error", "KL to dense", "greedy text parts at token"):
        assert shown in ran.out
    assert "note:" not in ran.err
    found = json.loads(out.read_text())
    assert found["format"] == 1
    assert found["parts"]["quality"]["overlap"]["checked"] > 100
    assert not found["parts"]["quality"]["overlap"]["flagged"]
    assert found["model"]["parameters"] < found["against"]["parameters"]
    again = cli(*command, "--parts", "quality", "--json")
    assert json.loads(again.out) == found


def test_calibration_text_is_flagged(cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path]) -> None:
    text = pruned.parent / "calibration.txt"
    ran = cli("evaluate", pruned, "--text", text, *SIZE, "--parts", "quality")
    assert ran.code == 0
    assert "of its 8-word passages are in the calibration text" in ran.err
    assert "flatter" in ran.err
    named = json.loads(cli("list", "parts", "--json").out)
    assert [row["name"] for row in named][:2] == ["quality", "positions"]


def test_a_wrong_part_is_one_line(cli: Callable[..., Any], pruned: Path, text_file: Path) -> None:
    ran = cli("evaluate", pruned, "--text", text_file, *SIZE, "--parts", "qualiti")
    assert ran.code == 1
    assert ran.err.startswith("error: no part is called 'qualiti'. Did you mean 'quality'?")
