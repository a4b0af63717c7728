"""Devices by name, and what happens when their memory runs out."""

import errno
import re

import pytest
import torch

from prunelm.data import BATCH_TOKENS
from prunelm.errors import CheckpointError, DeviceError
from prunelm.memory import memory_error, within_memory
from prunelm.placement import CPU, deterministic, exact, find_device
from prunelm.progress import silent
from prunelm.shortage import ran_out


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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_what_says_that_memory_ran_out(error: Exception) -> None:
    assert ran_out(error)
    asked: list[int] = []

    def run(batch_tokens: int) -> str:
        asked.append(batch_tokens)
        if len(asked) == 1:
            raise error
        return "done"

    assert within_memory(run, CPU, 16, silent)[0] == "done"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("shapes do not fit"),
        CheckpointError("out of memory"),
        ValueError("out of memory"),
    ],
)
def test_what_says_something_else(error: Exception) -> None:
    assert not ran_out(error)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory")])
def test_the_line_about_memory_has_numbers(error: Exception) -> None:
    said = str(memory_error(error))
    assert re.search(r"up to [\d,]{9,} bytes of main memory, and on \S+ [\d,]{9,} of [\d,]{9,} bytes are free", said)


def test_statistics_are_in_float64() -> None:
    assert exact(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float64


def test_determinism_is_asked_for_while_open_only() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled() == before
