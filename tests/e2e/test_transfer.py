"""Calibrated on one text, tested on another: every cell is what pruning and evaluating by hand give."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prunelm
from conftest import pseudo_english
from prunelm.errors import EvaluationError
from prunelm.workbench import Workbench

SIZE = ("--samples", "8", "--calibration-length", "32", "--length", "32", "--max-tokens", "192")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "words.txt").write_text(pseudo_english(6_000, seed=1))
    rows = [{"text": "".join(f"{(i * k) % 97} + {k}; " for k in range(40))} for i in range(12)]
    (folder / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [folder / "words.txt", folder / "numbers.jsonl"]


def test_every_cell_is_that_of_prune_and_evaluate(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], texts: list[Path], tmp_path: Path
) -> None:
    model, out = tiny_folder("llama"), tmp_path / "transfer.json"
    command = ("transfer", model, *texts, "--sparsity", "0.3", *SIZE, "--out", out)
    ran = cli(*command)
    assert ran.code == 0, ran
    assert "tested on numbers" in ran.out
    assert "dense" in ran.out
    found = json.loads(out.read_text())
    cells = {(c["calibrated"], c["tested"]): c for c in found["cells"]}
    assert len(cells) == 4
    rows = [json.loads(line)["text"] for line in texts[1].read_text().splitlines()]
    (tmp_path / "numbers-to-calibrate.jsonl").write_text("\n".join(json.dumps({"text": r}) for r in rows[::2]))
    (tmp_path / "tested.txt").write_text(texts[0].read_text()[3_000:])
    prunelm.prune(
        model, tmp_path / "P", sparsity=0.3, text=tmp_path / "numbers-to-calibrate.jsonl", samples=8, length=32
    )
    by_hand = prunelm.evaluate(tmp_path / "P", tmp_path / "tested.txt", against=model, length=32, max_tokens=192)
    cell = cells["numbers", "words"]
    assert cell["value"] == pytest.approx(by_hand.value, rel=1e-5)
    assert cell["kl"]["value"] == pytest.approx(by_hand.kl, rel=1e-4)
    assert not cell["overlap"]["flagged"]
    # A cell that is taken away is measured again, alike; nothing else is.
    kept = [c for c in found["cells"] if c is not found["cells"][3]]
    out.write_text(json.dumps({**found, "cells": kept}))
    assert cli(*command).code == 0
    assert json.loads(out.read_text()) == found
    other = cli(*command[:-1], out, "--seed", "3")
    assert other.code == 1
    assert f"error: {out}: of another run: recipe.seed was 0 and is 3. Name another file, or remove it." in other.err
    # So is one of another tokenizer.
    shutil.copytree(model, tmp_path / "llama")
    settings = tmp_path / "llama" / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    ran = cli("transfer", tmp_path / "llama", *command[2:])
    assert ran.code == 1
    assert f"{out}: of another run: model.tokenizer.tokenizer_config.json was " in ran.err


def test_texts_that_cannot_be_told_apart(cli: Callable[..., Any], tiny_folder: Any, texts: list[Path]) -> None:
    ran = cli("transfer", tiny_folder("llama"), texts[0], texts[0], "--sparsity", "0.3")
    assert ran.code == 1
    assert "at least two texts with different names are needed, got words, words" in ran.err
    ran = cli("transfer", tiny_folder("bert"), *texts, "--sparsity", "0.3")
    assert ran.code == 1
    assert "predict the next token" in ran.err


def test_other_texts_are_measured_anew_and_interrupts_lose_nothing(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out, third = tiny_folder("llama"), tmp_path / "transfer.json", tmp_path / "third.txt"
    third.write_text(pseudo_english(3_000, seed=5))
    size = ("--sparsity", "0.3", "--recipe", "goa-budget", *SIZE, "--out", out)
    recipe = prunelm.Recipe.load("goa-budget", sparsity=0.3, samples=8, length=32)
    options: dict[str, Any] = {"recipe": recipe, "length": 32, "max_tokens": 192, "out": out}
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    stops, solved = stopping_at("words on third", 2), blocks_put(monkeypatch)
    with pytest.raises(KeyboardInterrupt) as told:
        prunelm.transfer(model, [texts[0], third], progress=stops, **options)
    assert told.value.__notes__ == ["What is done is kept; give its command (prunelm transfer) again"]
    assert len(json.loads(out.read_text())["cells"]) == 1
    assert len(solved) == 2  # The blocks of one pruning.
    ran = cli("transfer", model, texts[0], texts[1], *size)
    assert ran.code == 1
    assert f"{out} has the unfinished work of another run: task.texts.third was " in ran.err
    assert "To finish that one, give its command (prunelm transfer) again. To drop it, say --force." in ran.err
    assert cli("transfer", model, texts[0], third, *size).code == 0
    assert not list(tmp_path.glob(".*"))
    assert len(solved) == 2 * 2
    found = json.loads(out.read_text())
    assert found["cells"] == prunelm.transfer(model, [texts[0], third], **{**options, "out": None})["cells"]
    assert set(found["versions"]) >= {"torch", "transformers"}
    # Another text of the same name: its cells go, and those that do not read it stay.
    third.write_text(" ".join(str(k * k) for k in range(900)))
    assert cli("transfer", model, texts[0], third, *size).code == 0
    again = json.loads(out.read_text())
    assert again["cells"][0] == found["cells"][0]
    assert all(new["value"] != old["value"] for new, old in zip(again["cells"][1:], found["cells"][1:], strict=True))
    # Unfinished work is dropped where that is said; other texts are added, and the table is of those asked for.
    out.write_text(json.dumps({**again, "cells": again["cells"][:1]}))
    with pytest.raises(KeyboardInterrupt):
        prunelm.transfer(model, [texts[0], third], progress=stopping_at("words on third", 2), **options)
    out.write_text(json.dumps(again))
    ran = cli("transfer", model, third, texts[1], *size, "--force")
    assert ran.code == 0, ran
    assert not list(tmp_path.glob(".*"))
    assert "tested on numbers" in ran.out
    assert "words" not in ran.out
    assert len(json.loads(out.read_text())["cells"]) == 7


def stopping_at(stage: str, done: int) -> Callable[[str, int, int], None]:
    """Progress that ends the work at some moment."""

    def stops(now: str, at: int, _total: int) -> None:
        if (now, at) == (stage, done):
            raise KeyboardInterrupt

    return stops


def blocks_put(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the blocks that are solved from now on."""
    put, seen = Workbench.put, list[str]()

    def noted(self: Workbench, name: str, step: Any) -> None:
        seen.extend([name] if name.startswith("block-") else [])
        put(self, name, step)

    monkeypatch.setattr(Workbench, "put", noted)
    return seen


def test_without_a_file_it_goes_on_too(
    cli: Callable[..., Any],
    tiny_folder: Callable[..., Path],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    model = tiny_folder("llama")
    command = ("transfer", model, *texts, "--sparsity", "0.3", "--recipe", "goa-budget", *SIZE, "--json")
    whole = cli(*command)
    assert whole.code == 0, whole
    assert list((tmp_path / "prunelm").iterdir()) == []
    solved, scored = blocks_put(monkeypatch), list[int]()
    options: dict[str, Any] = {"length": 32, "max_tokens": 192}
    options["recipe"] = prunelm.Recipe.load("goa-budget", sparsity=0.3, samples=8, length=32)
    with pytest.raises(KeyboardInterrupt):
        prunelm.transfer(model, texts, progress=stopping_at("numbers on words", 2), **options)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    from prunelm.suite import quality

    real = quality.score_windows
    monkeypatch.setattr(quality, "score_windows", lambda *args: scored.append(1) or real(*args))
    with monkeypatch.context() as patched:
        patched.setattr("prunelm.commands.transfer.print_json", full)
        assert cli(*command).code == 1
    assert len(solved) == 2 * 2
    assert len(scored) == (6 - 2) + 6
    assert cli(*command).out == whole.out
    assert len(solved) == 2 * 2
    assert len(scored) == (6 - 2) + 6
    assert list((tmp_path / "prunelm").iterdir()) == []


def test_losses_of_the_dense_model_are_finite_too(
    tiny_folder: Callable[..., Path], texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunelm.suite import quality

    real = quality.score_windows

    def broken(*args: Any) -> list[dict[str, Any]]:
        return [{**row, "dense": {**row["dense"], "loss": float("nan")}} for row in real(*args)]

    monkeypatch.setattr(quality, "score_windows", broken)
    recipe = prunelm.Recipe.load("l2", sparsity=0.3)
    options: dict[str, Any] = {"recipe": recipe, "length": 32, "max_tokens": 64}
    with pytest.raises(EvaluationError, match="words on words, dense model: 2 of 2 windows gave a non-finite loss"):
        prunelm.transfer(tiny_folder("llama"), texts, **options)


def test_a_model_that_writes_its_own_text_hangs_on_none(
    cli: Callable[..., Any], tiny_folder: Any, texts: list[Path]
) -> None:
    ran = cli("transfer", tiny_folder("llama"), *texts, "--sparsity", "0.3", "--recipe", "goa-data-free")
    assert ran.code == 1
    assert "texts and self-generated calibration exclude each other" in ran.err
