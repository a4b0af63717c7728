"""A few files that atheris chooses; `python -m benchmarks guided` reads 10,000 of each kind."""

import importlib.util

import pytest
from benchmarks import guided


@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", ["recipe.toml", pytest.param("config.json, loaded", marks=pytest.mark.slow)])
def test_files_that_atheris_chooses_are_read_or_refused(name: str) -> None:
    found = guided.campaign(name, 40)
    assert found["files"] == 40
    assert found["refused"] > 0
    assert found["crashes"] == []
    assert found["hangs"] == 0
    assert found["too_much_memory"] == []


def test_without_atheris_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    guided.main()
    assert capsys.readouterr().out == "skipped: atheris is not installed (pip install atheris)\n"
