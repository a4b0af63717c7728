"""What the C library keeps of freed memory, and how it is told to hand it back."""

import contextlib
import ctypes
import os
from collections.abc import Iterator

_C_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None
_THRESHOLD, _LARGE, _USUAL = -3, 2**20, 32 * 2**20
"""`M_MMAP_THRESHOLD` of glibc's malloc.h, what counts as large where little may stay, and how far glibc goes itself."""


def release_memory() -> None:
    """Hand freed memory back where the C library keeps it: after a block, that can be more than its weights."""
    trim = getattr(_C_LIBRARY, "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_large() -> None:
    """From now on, large pieces of memory go back as soon as they are freed, where the C library can be told.

    Otherwise glibc keeps pieces of up to 32 MiB among others, more of them with every block. It looks for room among
    what it keeps first, so whoever says this before anything large was freed has least kept.
    """
    _tell(_LARGE)


@contextlib.contextmanager
def large_returned() -> Iterator[None]:
    """While open, `return_large` holds; then freed memory is handed back, and things are as usual."""
    return_large()
    try:
        yield
    finally:
        _tell(_USUAL)
        release_memory()


def _tell(threshold: int) -> None:
    tell = getattr(_C_LIBRARY, "mallopt", None)
    if tell is not None:
        tell(_THRESHOLD, threshold)
