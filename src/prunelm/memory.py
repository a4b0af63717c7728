"""A run that answers to too little memory: smaller batches, once, and then a line with the numbers."""

from collections.abc import Callable
from typing import TypeVar

import torch

from .data import BATCH_TOKENS
from .distributed import rank, size
from .errors import DeviceError
from .placement import memory_words
from .progress import Progress

GPU_BATCH_TOKENS = 4 * BATCH_TOKENS
"""A GPU is busy only with more tokens at once."""
Found = TypeVar("Found")


def batch_tokens_on(device: torch.device) -> int:
    """How many tokens go through a model at once on a device, at first."""
    return BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS


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
    except torch.OutOfMemoryError as error:
        if size() > 1:
            raise DeviceError(
                f"{device}: memory ran out with batches of {usual:,} tokens on process {rank()} of {size()}, and "
                "several cannot begin anew with smaller ones. Use one process, or a smaller --length."
            ) from error
        note = f"{device}: memory ran out with batches of {usual:,} tokens; begun anew with one sequence of {length:,}"
    progress(note, 0, 1)
    torch.cuda.empty_cache()
    try:
        return run(length), [note]
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{device}: memory ran out with batches of one sequence of {length:,} tokens, and {memory_words(device)}. "
            "Use --compute-dtype bfloat16, a smaller --length, another --device, or --stream."
        ) from error
