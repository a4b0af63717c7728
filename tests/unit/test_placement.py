"""Devices by name, and what happens when their memory runs out."""

import pytest
import torch

from prunelm.data import BATCH_TOKENS
from prunelm.errors import DeviceError
from prunelm.memory import within_memory
from prunelm.placement import CPU, deterministic, exact, find_device
from prunelm.progress import silent


def test_without_a_name_there_is_always_a_device() -> None:
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu:0:1"])
def test_names_that_mean_nothing_are_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(DeviceError, match=r"no such device.*cpu"):
        find_device(name)


def test_a_device_that_is_not_here_is_refused_with_those_that_are() -> None:
    with pytest.raises(DeviceError, match="is not here: there is cpu"):
        find_device("cuda:99")


def test_too_little_memory_is_answered_with_smaller_batches_once() -> None:
    asked: list[int] = []

    def run(batch_tokens: int) -> str:
        asked.append(batch_tokens)
        if batch_tokens > 16:
            raise torch.OutOfMemoryError
        return "done"

    told: list[str] = []
    found, notes = within_memory(run, CPU, 16, lambda stage, _done, _total: told.append(stage))
    assert (found, asked) == ("done", [BATCH_TOKENS, 16])
    assert notes == told == ["cpu: memory ran out with batches of 1,024 tokens; begun anew with one sequence of 16"]


def test_too_little_memory_twice_is_an_error_with_numbers() -> None:
    def run(_batch_tokens: int) -> str:
        raise torch.OutOfMemoryError

    with pytest.raises(DeviceError, match=r"one sequence of 16 tokens, and [\d,]+ of [\d,]+ bytes are free"):
        within_memory(run, CPU, 16, silent)


def test_statistics_are_in_float64() -> None:
    assert exact(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


def test_determinism_is_asked_for_while_open_only() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before
