"""A few kills and faults of every kind; `python -m benchmarks faults` makes 100 kills."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmarks import faults

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are forked and stopped")
SAID = {
    "SIGTERM": (143, "error: ended by SIGTERM; nothing was left half-written"),
    "quota on the size of a file": (1, "File too large"),
    "scratch file cut short": (1, "cut short while it was in use: 0 bytes of at least"),
    "one bit of finished work": (0, ""),
    "one bit of the dense weights": (1, "the unfinished work of other inputs: model.weights.model.safetensors was"),
}
LONGER = {
    "Ctrl-C": (130, "error: interrupted; nothing was left half-written"),
    "disk too small": (1, "bytes are needed"),
    "disk full": (1, "cannot be written: "),
    "read-only output": (1, "cannot be written to"),
    "one of two processes killed": (1, "another process of this run was lost (its connection broke)"),
    "one bit of a saved calibration": (1, "damaged or cut short (another sha256)"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[faults.Place]:
    with faults.unproven():
        yield faults.prepared(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("command", faults.COMMANDS)
def test_a_killed_run_goes_on(command: str, place: faults.Place, without_type_checks: None) -> None:
    found = faults.killed(place, command, 1, seed=3)
    assert (found.resumed, found.identical, found.orphans, found.failures) == (1, 1, [], [])


def check(name: str, status: int, says: str, place: faults.Place) -> None:
    found = faults.FAULTS[name](place)
    assert found["status"] == status, found
    assert says in found["said"]
    assert found["lines"] == (1 if says else 0)
    assert found["lost"] is False
    assert found["left"] == []


@pytest.mark.parametrize("name", SAID)
def test_faults(name: str, place: faults.Place, without_type_checks: None) -> None:
    check(name, *SAID[name], place)


@pytest.mark.slow
@pytest.mark.parametrize("name", LONGER)
def test_more_faults(name: str, place: faults.Place, without_type_checks: None) -> None:
    check(name, *LONGER[name], place)


def test_every_fault_is_tested() -> None:
    assert {*SAID, *LONGER} == set(faults.FAULTS)
    assert faults.KILLS * len(faults.COMMANDS) >= 100
