"""How memory that ran out is told from other errors."""

import errno

import torch

from .errors import PruneLMError

_SAID = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What libraries say when memory runs out: those of GPUs (`CUBLAS_STATUS_ALLOC_FAILED`), and that of the CPU."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, that of a GPU or of the machine."""
    if isinstance(error, PruneLMError):
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in said for words in _SAID)
