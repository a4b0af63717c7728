"""What can go wrong with an evaluation, as a user meets it: one line each, and nothing lost after a kill."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import forked

import prunelm
from conftest import pseudo_english
from prunelm.loading import find_model, load_model

SIZE = ("--length", "32", "--max-tokens", "256")


def error_of(ran: Any) -> str:
    """The one line of an error."""
    assert ran.code == 1, ran
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def places(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("faults")
    dense = folder / "DENSE"
    shutil.copytree(tiny_folder("llama"), dense)
    prunelm.prune(dense, folder / "OUT", recipe="l2", sparsity=0.3)
    (folder / "text.txt").write_text(pseudo_english(16_000, seed=4))
    (folder / "short.txt").write_text("few words")
    return {name: folder / name for name in ("DENSE", "OUT", "text.txt", "short.txt")}


def test_killed_in_the_middle_it_goes_on_with_the_same_numbers(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = ("evaluate", places["OUT"], "--text", places["text.txt"], "--against", places["DENSE"], "--length", "32")
    out, whole = tmp_path / "evaluation.json", tmp_path / "whole.json"
    heard = tmp_path_factory.mktemp("heard")
    running = forked.start(heard, "-m", "prunelm", *map(str, words), "--out", str(out))
    journal = tmp_path / ".evaluation.json.quality.journal"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_text().count("\n") > 20):
        assert running.code is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not out.exists()
    kept = journal.read_text().count("\n")
    assert cli(*words, "--out", out).code == 0
    assert cli(*words, "--out", whole).code == 0
    ours, theirs = (json.loads(path.read_text())["parts"]["quality"] for path in (out, whole))
    assert ours["results"] == theirs["results"]
    assert kept > 20
    assert len(ours["results"]["windows"]) > kept
    assert not list(tmp_path.glob(".*"))


def interrupted(
    cli: Callable[..., Any], words: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, after: int = 3
) -> Any:
    """A command that Ctrl-C ends after so many windows."""
    from prunelm.cli import _Interrupted
    from prunelm.suite import quality

    scored, seen = quality.score_windows, list[int]()

    def counted(*args: Any) -> Any:
        seen.append(1)
        if len(seen) > after:
            raise _Interrupted(signal.SIGINT)
        return scored(*args)

    with monkeypatch.context() as patch:
        patch.setattr(quality, "score_windows", counted)
        return cli(*words)


def test_interrupted_it_says_how_to_go_on(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "evaluation.json", tmp_path / "whole.json"
    words = ("evaluate", places["OUT"], "--text", places["text.txt"], *SIZE, "--out")
    ran = interrupted(cli, (*words, out), monkeypatch)
    assert ran.code == 128 + signal.SIGINT
    assert ran.err == "error: interrupted; What is done is kept; give its command (prunelm evaluate) again\n"
    assert [path.name for path in tmp_path.iterdir()] == [".evaluation.json.quality.journal"]
    assert cli(*words, out).code == cli(*words, whole).code == 0
    found = [json.loads(path.read_text())["parts"]["quality"]["results"] for path in (out, whole)]
    assert found[0] == found[1]
    ran = interrupted(cli, (*words, tmp_path / "other.json"), monkeypatch, after=0)
    assert ran.err == "error: interrupted; nothing was left half-written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "whole.json"]


@pytest.mark.parametrize("what", ["text", "tokenizer", "length"])
def test_what_was_begun_with_other_inputs_is_refused_and_says_what_differs(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model, text, out = tmp_path / "MODEL", tmp_path / "text.txt", tmp_path / "E.json"
    shutil.copytree(places["DENSE"], model)
    shutil.copy(places["text.txt"], text)
    words = ["evaluate", model, "--text", text, "--max-tokens", "256", "--out", out, "--length", "32"]
    interrupted(cli, tuple(words), monkeypatch)
    if what == "text":
        text.write_text(pseudo_english(16_000, seed=5))
    elif what == "tokenizer":
        exchange_tokens(model)
    else:
        words[-1] = "64"
    name = {"text": "text.sha256", "tokenizer": "model.tokenizer", "length": "settings.length"}[what]
    journal = tmp_path / ".E.json.quality.journal"
    line = error_of(cli(*words))
    assert line.startswith(f"error: {journal}: the journal of other work: {name} was ")
    assert line.endswith(" Put that back, name another file, or remove this one to begin anew.")
    journal.unlink()
    assert cli(*words).code == 0
    assert not list(tmp_path.glob(".*"))


def test_an_evaluation_of_another_tokenizer_is_refused(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path
) -> None:
    model, out = tmp_path / "MODEL", tmp_path / "E.json"
    shutil.copytree(places["DENSE"], model)
    words = ("evaluate", model, "--text", places["text.txt"], *SIZE, "--out", out)
    assert cli(*words).code == 0
    exchange_tokens(model)
    line = error_of(cli(*words))
    assert f"{out} is an evaluation with another tokenizer: that of MODEL was " in line
    found = json.loads(out.read_text())
    found["model"].pop("tokenizer")
    out.write_text(json.dumps(found))
    assert "that of MODEL was not noted, and is now " in error_of(cli(*words))


def exchange_tokens(folder: Path) -> None:
    """Let a tokenizer call the two letters by each other's number."""
    data = json.loads((folder / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(data))


@pytest.mark.parametrize("parts", ["quality", "positions", "noise"])
def test_a_text_shorter_than_a_window(cli: Callable[..., Any], places: dict[str, Path], parts: str) -> None:
    line = error_of(cli("evaluate", places["OUT"], "--text", places["short.txt"], *SIZE, "--parts", parts))
    assert "short.txt" in line
    assert "one window needs" in line
    assert "Use a smaller --length" in line


def test_a_task_that_nobody_knows(cli: Callable[..., Any], places: dict[str, Path]) -> None:
    line = error_of(cli("evaluate", places["OUT"], "--text", places["text.txt"], *SIZE, "--tasks", "arc_eazy"))
    assert "lm-eval" in line
    assert "knows no task 'arc_eazy'" in line or "pip install 'prunelm[eval]'" in line


@pytest.mark.parametrize("command", ["evaluate", "suite", "compare"])
def test_a_dense_parent_that_is_gone(cli: Callable[..., Any], places: dict[str, Path], command: str) -> None:
    gone = places["DENSE"].parent / "GONE"
    text = ("--text", places["text.txt"], *SIZE)
    words = {
        "evaluate": ("evaluate", places["OUT"], *text, "--against", gone),
        "suite": ("evaluate", places["OUT"], *text, "--against", gone, "--parts", "quality"),
        "compare": ("compare", gone, places["OUT"], *text),
    }[command]
    line = error_of(cli(*words))
    assert f"no such model: '{gone}'" in line
    assert "was made from DENSE: name the place where that is now" in line


@pytest.mark.parametrize("command", ["evaluate", "suite", "compare"])
def test_tokenizers_that_differ(cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path, command: str) -> None:
    other = tmp_path / "OTHER"
    shutil.copytree(places["DENSE"], other)
    exchange_tokens(other)
    text = ("--text", places["text.txt"], *SIZE)
    words = {
        "evaluate": ("evaluate", places["OUT"], *text, "--against", other),
        "suite": ("evaluate", places["OUT"], *text, "--against", other, "--parts", "generation"),
        "compare": ("compare", other, places["OUT"], *text),
    }[command]
    assert "the two models cannot be compared: their tokenizers make" in error_of(cli(*words))


def test_losses_that_are_not_finite_name_window_and_block(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path
) -> None:
    model = load_model(find_model(places["DENSE"]))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    shutil.copytree(places["DENSE"], tmp_path / "BAD")
    model.save_pretrained(tmp_path / "BAD")
    out = ("--out", tmp_path / "E.json")
    for against in ((), out, ("--against", places["DENSE"], "--parts", "quality", *out)):
        line = error_of(cli("evaluate", tmp_path / "BAD", "--text", places["text.txt"], *SIZE, *against))
        assert "8 of 8 windows gave a non-finite loss, first window 0, where block 1 gave the first value" in line
        assert [path.name for path in tmp_path.iterdir()] == ["BAD"]


def test_a_report_without_evaluation_files_says_what_is_missing(
    cli: Callable[..., Any], places: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert cli("report", places["OUT"], "--out", page).code == 0
    text = page.read_text()
    assert "No quality has been measured yet" in text
    assert "No evaluation was found" in text
    line = error_of(cli("report", tmp_path, "--out", page))
    assert "no pruning.json in it or one level below. Name a folder that prunelm prune wrote." in line
