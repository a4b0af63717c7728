"""`prunelm evaluate --parts` as a user meets it: the table, the file, the warning about calibration text."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunelm.card import model_card

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
    ran = cli(*command, "--parts", "quality,generation", "--prompts", "3", "--new-tokens", "5")
    assert ran.code == 0, ran
    for shown in ("perplexity", "bits per byte", "calibration error", "KL to dense", "greedy text parts at token"):
        assert shown in ran.out
    assert "note:" not in ran.err
    found = json.loads(out.read_text())
    assert found["format"] == 1
    assert found["parts"]["quality"]["overlap"]["checked"] > 30
    assert not found["parts"]["quality"]["overlap"]["flagged"]
    assert found["model"]["parameters"] < found["against"]["parameters"]
    assert found["parts"]["generation"]["settings"] == {"prompts": 3, "new_tokens": 5, "dtype": "float32"}
    again = cli(*command, "--parts", "quality", "--json")
    assert json.loads(again.out) == found


def test_calibration_text_is_flagged(
    cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    text, page = pruned.parent / "calibration.txt", tmp_path / "page.html"
    for words in (
        ("evaluate", pruned, "--text", text, *SIZE, "--parts", "quality"),
        ("evaluate", pruned, "--text", text, *SIZE),
        ("compare", tiny_folder("llama"), pruned, "--text", text, *SIZE, "--out", page),
    ):
        ran = cli(*words)
        assert ran.code == 0
        assert "of its 8-word passages are in the calibration text" in ran.err
        assert "flatter" in ran.err
    assert "of its 8-word passages are in the calibration text" in page.read_text()
    named = json.loads(cli("list", "parts", "--json").out)
    assert [row["name"] for row in named][:2] == ["quality", "positions"]


def test_a_wrong_part_is_one_line(cli: Callable[..., Any], pruned: Path, text_file: Path) -> None:
    ran = cli("evaluate", pruned, "--text", text_file, *SIZE, "--parts", "qualiti")
    assert ran.code == 1
    assert ran.err.startswith("error: no part is called 'qualiti'. Did you mean 'quality'?")


def test_the_model_card_carries_what_was_measured(
    cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path], text_file: Path
) -> None:
    held_out = pruned.parent / "unseen.txt"
    held_out.write_text(text_file.read_text()[20_000:])
    card = pruned / "README.md"
    assert "model-index" not in card.read_text()
    assert "- No quality has been measured yet" in card.read_text()
    command = ("evaluate", pruned, "--text", held_out, "--against", tiny_folder("llama"), *SIZE)
    assert cli(*command, "--out", pruned / "evaluation.json").code == 0
    text = card.read_text()
    (head,) = re.findall(r"^---\n(.*?)^---$", text, re.M | re.S)
    results = yaml.safe_load(head)["model-index"][0]["results"][0]
    found = json.loads((pruned / "evaluation.json").read_text())["parts"]["quality"]["results"]
    metrics = {metric["type"]: metric["value"] for metric in results["metrics"]}
    assert metrics["perplexity"] == pytest.approx(found["value"], rel=1e-5)
    assert metrics["kl_to_dense"] == pytest.approx(found["kl"]["value"], rel=1e-4)
    assert (results["task"]["type"], results["dataset"]["name"]) == ("text-generation", "unseen.txt")
    assert f"| perplexity | {found['dense']['value']:.4g} ±" in text
    assert "## Load it" in text
    assert "No quality has been measured" not in text
    facts = {**json.loads((pruned / "pruning.json").read_text()), "base_model": 'ours: "tiny" #1'}
    (head,) = re.findall(r"^---\n(.*?)^---$", model_card(facts), re.M | re.S)
    assert yaml.safe_load(head)["base_model"] == 'ours: "tiny" #1'
    # More parts renew the card; a card that somebody edited stays as it is.
    assert cli(*command, "--parts", "generation", "--out", pruned / "evaluation.json").code == 0
    assert "| same continuation |" in card.read_text()
    card.write_text("mine")
    assert cli(*command, "--max-tokens", "128", "--out", pruned / "evaluation.json").code == 0
    assert card.read_text() == "mine"


def test_the_model_card_is_true(
    cli: Callable[..., Any], tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """No dense model where there was none, texts at their rows, the base model's license, names that hold signs."""
    dense, out, other = tmp_path / "dense", tmp_path / "OUT", tmp_path / "a|b.txt"
    shutil.copytree(tiny_folder("llama"), dense)
    (dense / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny-1\nlicense_link: LICENSE\ntags:\n- license: x\n"
        "pipeline_tag: text2text-generation\n---\nlicense: mit\n"
    )
    other.write_text(text_file.read_text()[:4_000])
    assert cli("prune", dense, out, "--sparsity", "0.3", "--recipe", "l2").code == 0
    card, line = out / "README.md", "pipeline_tag: text-generation"

    def head() -> dict[str, Any]:
        found = re.findall(r"^---\n(.*?)^---$", card.read_text(), re.M | re.S)
        return dict(yaml.safe_load(found[0]))

    expected = {"license": "other", "license_name": "tiny-1", "pipeline_tag": "text-generation"}
    assert {name: head()[name] for name in expected} == expected
    assert "license_link" not in head()
    assert card.read_text().count(line) == 1
    window = (*SIZE, "--out", out / "evaluation.json")
    assert cli("evaluate", out, "--text", text_file, *window).code == 0
    assert "Measured on `words.txt` where nothing else is said, without the dense model beside it." in card.read_text()
    assert cli("evaluate", out, "--text", other, *window, "--parts", "noise").code == 0
    text = card.read_text()
    assert "| bits per byte more with typos 0.01 (on a\\|b.txt) | " in text
    assert "| perplexity |  | " in text
    rows = [row for row in text.splitlines() if row.startswith("| bits per byte more")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)
    assert {name: head()[name] for name in expected} == expected
    (dense / "README.md").write_text("no head")
    assert cli("prune", dense, tmp_path / "BARE", "--sparsity", "0.3", "--recipe", "l2").code == 0
    assert "license" not in (tmp_path / "BARE" / "README.md").read_text().partition("\n---\n")[0]


def test_what_is_scored_is_looked_for_in_the_calibration_text(
    cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """A long text whose scored head was calibrated on is flagged; a few words tell nothing."""
    dense = tiny_folder("llama")
    long, unseen = tmp_path / "long.txt", tmp_path / "unseen.txt"
    words = text_file.read_text()
    long.write_text(words[:2_500] + " " + " ".join(f"{k * k} {k}" for k in range(40_000)))
    unseen.write_text(words[20_000:])
    size = ("--length", "32", "--max-tokens", "1024")
    flagged = "long.txt: about"
    page = ("--others", long, "--parts", "quality,shift")
    assert flagged in cli("evaluate", pruned, "--text", long, *size).err
    assert flagged in cli("evaluate", pruned, "--text", long, *size, "--parts", "quality").err
    assert flagged in cli("evaluate", pruned, "--text", unseen, *size, *page).err
    assert flagged in cli("compare", dense, pruned, "--text", long, *size).err
    few = cli("evaluate", pruned, "--text", unseen, "--length", "32", "--max-tokens", "96")
    assert "whether unseen.txt was calibrated on is not known: only" in few.err
    assert "passages could be checked, at least 30 are needed; score more text" in few.err


def test_one_window_has_no_error_anywhere(
    cli: Callable[..., Any], pruned: Path, tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    dense, page, matrix = tiny_folder("llama"), tmp_path / "page.html", tmp_path / "transfer.json"
    other = tmp_path / "numbers.txt"
    other.write_text(" ".join(f"{k * k}" for k in range(300)))
    window = ("--length", "32", "--max-tokens", "32")
    plan = json.loads((pruned / "pruning.json").read_text())["recipe"]
    again = tmp_path / "OUT"
    shutil.copytree(pruned, again, ignore=shutil.ignore_patterns("evaluation.json"))
    parts = ("--parts", "quality,noise", "--others", other, "--out", again / "evaluation.json")
    small = ("--sparsity", f"{plan['sparsity']}", "--samples", "8", "--calibration-length", "32", "--out", matrix)
    for words in (
        ("evaluate", again, "--text", text_file, "--against", dense, *window, *parts),
        ("evaluate", again, "--text", text_file, "--against", dense, *window),
        ("transfer", dense, text_file, other, *window, *small),
        ("compare", dense, again, "--text", text_file, *window, "--out", page),
    ):
        ran = cli(*words)
        assert ran.code == 0, ran
        assert not re.search(r"\+-|\(\d|nan|None", ran.out.replace("(1.00x)", "").partition("prefill")[0]), ran.out
    shutil.copy(matrix, again / "transfer.json")
    assert cli("report", again).code == 0
    for path in (page, again / "report.html"):
        shown = re.sub(r"<(script|style).*?</\1>", "", path.read_text(), flags=re.S)
        assert not re.search(r"±|\bnan\b|\bNone\b", shown)
    assert "Transfer between texts" in shown
    assert "±" not in (again / "README.md").read_text()


def test_labeled_texts_are_looked_for_one_by_one(byte_tokenizer: Any, tmp_path: Path) -> None:
    from prunelm.suite.passages import scored_texts
    from prunelm.testing import tiny_model

    model = tiny_model("bert", model_class="BertForSequenceClassification", vocab_size=300, max_position_embeddings=128)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one text", "label": 0}\n{"text": "another text", "label": 1}\n{"text": "c", "label": 1}')
    assert scored_texts(model, byte_tokenizer, rows, length=7, max_tokens=12) == ["one tex", "another"]
