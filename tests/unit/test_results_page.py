"""The page of results, and the figures that the README takes from it, are those of the benchmarks' files."""

from pathlib import Path

from benchmarks import record, table

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_files_say(tmp_path, monkeypatch):
    written = table.PAGE.read_text(encoding="utf-8")
    monkeypatch.setattr(table, "PAGE", tmp_path / "results.md")
    table.write()
    assert table.PAGE.read_text(encoding="utf-8") == written, "run python -m benchmarks table"


def test_the_figures_of_the_readme_were_measured():
    said = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    dense = record.read("frontier")["dense"]["evaluation"]
    pruned = record.read("families")["best-uniform 0.3 stepped"]["evaluation"]
    for text in ("WikiText-2", "C4"):
        assert f"{text} perplexity" in said
        assert f"from {dense[text]['value']:.2f} to {pruned[text]['value']:.2f}" in said
    assert f"read {record.read('overhead')['speed']['speedup']:.3f} times as fast" in said
