"""A run that answers to too little memory: smaller batches, once, and then a line with the numbers."""

from collections.abc import Callable
from typing import TypeVar

import torch

from .data import BATCH_TOKENS
from .distributed import rank, size
from .errors import DeviceError, PruneLMError
from .placement import memory_words
from .progress import Progress

GPU_BATCH_TOKENS = 4 * BATCH_TOKENS
"""A GPU is busy only with more tokens at once."""
_SAID = ("out of memory", "can't allocate memory", "not enough memory")
"""What libraries say when memory runs out: those of GPUs, and that of the CPU."""
Found = TypeVar("Found")


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, that of a GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and not isinstance(error, PruneLMError) and any(s in said for s in _SAID)


def memory_error(error: BaseException) -> DeviceError:
    """The line about memory that ran out where nothing smaller could be tried, with the notes of the error."""
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    line = DeviceError(f"memory ran out ({first[:200].rstrip('.')}). Use a smaller --length, or another --device.")
    line.__notes__ = list(getattr(error, "__notes__", ()))
    return line


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
    except (RuntimeError, MemoryError) as error:
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
    except (RuntimeError, MemoryError) as error:
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
