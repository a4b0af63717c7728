"""A run that answers to too little memory: smaller batches, once, and then a line with the numbers."""

import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from .data import BATCH_TOKENS
from .distributed import rank, size
from .errors import DeviceError
from .placement import CPU, memory_words
from .progress import Progress
from .shortage import ran_out

GPU_BATCH_TOKENS = 4 * BATCH_TOKENS
"""A GPU is busy only with more tokens at once."""
_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes that the system counts memory in."""
Found = TypeVar("Found")


def memory_error(error: BaseException) -> DeviceError:
    """The line about memory that ran out where nothing smaller could be tried, with the notes of the error."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    computes = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
    device = torch.device("cuda", torch.cuda.current_device()) if computes else CPU
    peak = resident_peak()
    taken = "" if peak is None else f"this process has had up to {peak:,} bytes of main memory, and "
    line = DeviceError(
        f"memory ran out ({first[:200].rstrip('.')}); {taken}on {device} {memory_words(device)}. Use a smaller "
        "--length, or another --device."
    )
    line.__notes__ = list(getattr(error, "__notes__", ()))
    return line


def resident_peak() -> int | None:
    """The most bytes of the machine's memory that this process has had; None where the system does not say."""
    if os.name != "posix":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT


def batch_tokens_on(device: torch.device) -> int:
    """How many tokens go through a model at once on a device, at first."""
    return BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS


def smaller_batches(device: torch.device, batch_tokens: int) -> list[str]:
    """What results say of a run that was begun anew with smaller batches; nothing of one with the usual."""
    usual = batch_tokens_on(device)
    if batch_tokens == usual:
        return []
    return [
        f"{device}: memory ran out with batches of {usual:,} tokens; begun anew with one sequence of {batch_tokens:,}"
    ]


def within_memory(
    run: Callable[[int], Found], device: torch.device, length: int, progress: Progress
) -> tuple[Found, list[str]]:
    """What `run` gives with the usual number of tokens in a batch, or else with one sequence in each, and a note of it.

    Args:
        run: called with the number of tokens in a batch; begins anew each time.
        device: where it runs.
        length: tokens of a sequence.
        progress: told when it begins anew.

    Raises:
        DeviceError: one sequence at a time is too much, too; says how much memory there is.
    """
    usual = batch_tokens_on(device)
    try:
        return run(usual), []
    except (RuntimeError, MemoryError, OSError) as error:
        if not ran_out(error):
            raise
        if size() > 1:
            raise DeviceError(
                f"{device}: memory ran out with batches of {usual:,} tokens on process {rank()} of {size()}, and "
                "several cannot begin anew with smaller ones. Use one process, or a smaller --length."
            ) from error
    notes = smaller_batches(device, length)
    for note in notes:
        progress(note, 0, 1)
    _hand_back(device)
    try:
        return run(length), notes
    except (RuntimeError, MemoryError, OSError) as error:
        if not ran_out(error):
            raise
        raise DeviceError(
            f"{device}: memory ran out with batches of one sequence of {length:,} tokens, and {memory_words(device)}. "
            "Use --compute-dtype bfloat16, a smaller --length, another --device, or --stream."
        ) from error


def _hand_back(device: torch.device) -> None:
    """Let go of what an allocator keeps of memory that nobody uses."""
    if device.type == "mps":
        torch.mps.empty_cache()
    torch.cuda.empty_cache()
