"""A few damaged files of every kind; `python -m benchmarks fuzz` reads 10,000 of each."""

from pathlib import Path

import pytest
from benchmarks import fuzz

from prunelm.errors import CheckpointError
from prunelm.forms import check_form
from prunelm.gguf_header import gguf_header

NAMES = (
    "safetensors index",
    "safetensors header",
    "GGUF header",
    "config.json",
    "config.json, loaded",
    "pruning.json",
    "pruning.json, reported",
    "evaluation.json",
    "calibration.json",
    ".txt",
    ".jsonl",
    "plan.json",
    "recipe.toml",
    "journal",
    "task.json",
)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Kind]:
    return fuzz.kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_are_read_or_refused(name: str, kinds: dict[str, fuzz.Kind], without_type_checks: None) -> None:
    assert tuple(kinds) == NAMES
    found = fuzz.campaign(kinds[name], 30)
    assert found.files >= 30
    assert found.refused > 0
    assert found.crashes == []
    assert found.hangs == 0
    assert found.too_much_memory == []


@pytest.mark.parametrize("times", [1, 2])
def test_memory_is_the_files_own_where_it_is_needed_twice(times: int) -> None:
    left = [bytearray] * times

    def greedy(_raw: bytes) -> None:
        if left:
            left.pop()(2 * fuzz.FIXED)

    found = fuzz.Found()
    fuzz.attempt(greedy, b"file", found)
    assert found.files == 1
    assert len(found.once) == (times == 1)
    assert len(found.too_much_memory) == (times == 2)


@pytest.mark.parametrize("place", [8, 16], ids=["tensors", "fields"])
def test_counts_of_a_gguf_header_are_not_believed(place: int, kinds: dict[str, fuzz.Kind], tmp_path: Path) -> None:
    raw = bytearray(kinds["GGUF header"].whole)
    raw[place : place + 8] = b"\xff" * 8
    (tmp_path / "model.gguf").write_bytes(raw)
    with pytest.raises(ValueError, match=r"bytes are named at byte|unknown type|axes"):
        gguf_header(tmp_path / "model.gguf")


def test_the_first_wrong_place_is_named(tmp_path: Path) -> None:
    form = {"sites": {str: {"units": int, "kept?": [int]}}, "hidden?": (None, str)}
    check_form({"sites": {"0.ffn": {"units": 3, "kept": [0]}}, "hidden": None, "more": 1}, form, tmp_path)
    for data, says in (
        ([], r"it must be an object, got \[\]"),
        ({}, "it has no 'sites'"),
        ({"sites": {"0.ffn": {}}}, r"sites\.0\.ffn has no 'units'"),
        ({"sites": {"0.ffn": {"units": True}}}, r"sites\.0\.ffn\.units must be a whole number, got True"),
        ({"sites": {"0.ffn": {"units": 1, "kept": [0, 1.5]}}}, r"kept\[1\] must be a whole number, got 1\.5"),
        ({"sites": {}, "hidden": 3}, "hidden must be null or a string, got 3; the file is damaged"),
    ):
        with pytest.raises(CheckpointError, match=says):
            check_form(data, form, tmp_path)


@pytest.mark.parametrize("name", ["link/secret.safetensors", "../outside/secret.safetensors", "/etc/passwd", "", ".."])
def test_no_shard_lies_outside_its_folder(name: str, kinds: dict[str, fuzz.Kind]) -> None:
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        kinds["safetensors index"].read(b'{"weight_map": {"x": %s}}' % f'"{name}"'.encode())
