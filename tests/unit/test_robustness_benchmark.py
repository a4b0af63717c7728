"""The robustness benchmark on a tiny model: a cell per recipe, size and calibration text, and its two tables."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from benchmarks import __main__, record, robustness, table

from conftest import pseudo_english

TINY = robustness.Sizes(samples=16, calibration_length=32, length=32, max_tokens=128, noisy_tokens=96)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(table, "PAGE", tmp_path / "results.md")
    return tmp_path / "results"


def test_cells_and_tables(
    results: Path, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "SPARSITIES", (0.5,))
    texts = {"C4": pseudo_english(6_000, seed=1), "Python reference": "def name(value): return [value]. " * 150}
    tested = {}
    for name, text in {**texts, "WikiText-2": pseudo_english(3_000, seed=5)}.items():
        tested[name] = tmp_path / f"{name}.txt"
        tested[name].write_text(text[len(text) // 2 :] if name in texts else text)
    documents = {name: [text[: len(text) // 2]] for name, text in texts.items()}
    folder = tiny_folder("llama", intermediate_size=128)
    robustness.run(folder, documents, tested, sizes=TINY)
    entries = json.loads((results / "robustness.json").read_text())
    assert len(entries) == 4
    home = entries["goa 0.5 C4"]
    assert set(home["tested"]) == set(tested)
    assert len(home["noise"]["noisy"]) == 12
    assert home["tested"]["C4"]["overlap"]["flagged"] is False
    assert "noise" not in entries["best 0.5 Python reference"]
    table.write()
    page = table.PAGE.read_text()
    ratio = home["tested"]["WikiText-2"]["ratio"]
    assert f"({ratio['value']:.2f}, {ratio['low']:.2f} to {ratio['high']:.2f})" in page
    assert "| best at 50% | Python reference |" in page
    del entries["best 0.5 Python reference"]
    lines = table._robustness(entries)
    assert "| best at 50% | Python reference | not run | not run | not run |" in lines
    added = home["noise"]["noisy"][0]["added"]
    assert f"| typos | 0.01 | {added['dense']['value']:+.3f}, " in page


def test_the_command_line(results: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[str] = []
    monkeypatch.setenv(record.DEVICE, "cpu")
    monkeypatch.setitem(__main__.RUNS, "robustness", lambda: asked.append(record.device()))
    monkeypatch.setattr(__main__.table, "write", lambda: None)
    assert __main__.main(["robustness"]) == 0
    assert __main__.main(["run", "robustness", "--device", "cuda"]) == 0
    assert asked == ["cpu", "cuda"]
    with pytest.raises(SystemExit, match="2"):
        __main__.main(["quantity"])
    assert "invalid choice: 'quantity'" in capsys.readouterr().err


def test_processes_that_measure_together_claim_cells(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(record.TOGETHER, str(tmp_path))
    ran: list[int] = []
    for number in range(2):
        record.measure("some", "cell", lambda number=number: {"run": ran.append(number)})
        (results / "some.json").unlink(missing_ok=True)
    assert ran == [0]
