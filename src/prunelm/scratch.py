"""Hidden states on disk: one file of equal slots, of which one is mapped at a time, for calibrations beyond memory."""

import contextlib
import errno
import mmap
import os
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, OutputError
from .writing import reason

FILE = "hidden.bin"
SPARE = 2
"""Slots beyond those that hidden states need at rest: a new state is written before the old one is let go."""


@dataclass(eq=False)
class _Held:
    """Where one tensor lies; its slot is free again when nobody refers to this any more."""

    slot: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Scratch:
    """A file in a folder, large enough for some tensors and made whole before the first is written."""

    def __init__(
        self, folder: Path, slots: int, slot_bytes: int, dtype: torch.dtype | None = None, *, name: str = FILE
    ) -> None:
        self.path, self.dtype, self.slots = folder / name, dtype, slots
        self._slot_bytes = rounded(slot_bytes)
        self._free = list(range(slots))
        size = slots * self._slot_bytes
        self._file = _allocated(self.path, size)

    def store(self, tensor: Tensor) -> _Held:
        """Write a tensor into a free slot."""
        slot = self._free.pop()
        held = _Held(slot, tensor.shape, tensor.dtype, tensor.device)
        weakref.finalize(held, self._free.append, slot)
        kept = tensor.detach().to("cpu", self.dtype or tensor.dtype).contiguous()
        with self._mapped(slot, kept.nbytes) as mapped:
            view = torch.frombuffer(mapped, dtype=kept.dtype, count=kept.numel())
            view.copy_(kept.flatten())
            del view
        return held

    def read(self, held: _Held) -> Tensor:
        """The tensor in a slot, as it was but for the dtype that it waited in."""
        dtype = self.dtype or held.dtype
        with self._mapped(held.slot, held.shape.numel() * dtype.itemsize) as mapped:
            view = torch.frombuffer(mapped, dtype=dtype, count=held.shape.numel())
            found = view.to(held.device, held.dtype, copy=True).view(held.shape)
            del view
        return found

    @contextlib.contextmanager
    def _mapped(self, slot: int, size: int) -> Iterator[mmap.mmap]:
        """A slot as memory, once the file is seen to reach that far: beyond its end, a mapping ends the process."""
        end, there = (slot + 1) * self._slot_bytes, os.fstat(self._file).st_size
        if there < end:
            raise CheckpointError(f"{self.path}: cut short while it was in use: {there:,} bytes of at least {end:,}.")
        mapped = mmap.mmap(self._file, size, offset=slot * self._slot_bytes)
        try:
            yield mapped
        finally:
            mapped.close()

    @property
    def idle(self) -> bool:
        """Whether nothing lies here."""
        return len(self._free) == self.slots

    def states(self) -> "StoredStates":
        """A new list of tensors that lie here."""
        return StoredStates(self)

    def close(self) -> None:
        """Remove the file."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)


class StoredStates:
    """A list of tensors in a scratch file; a copy shares them until one of the two is written to."""

    def __init__(self, scratch: Scratch, held: list[_Held] | None = None) -> None:
        self._scratch, self._held = scratch, held or []

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, b: int) -> Tensor:
        return self._scratch.read(self._held[b])

    def __setitem__(self, b: int, tensor: Tensor) -> None:
        self._held[b] = self._scratch.store(tensor)

    def append(self, tensor: Tensor) -> None:
        """Add one at the end."""
        self._held.append(self._scratch.store(tensor))

    def copy(self) -> "StoredStates":
        """The same tensors in a list of their own."""
        return StoredStates(self._scratch, list(self._held))


def rounded(size: int) -> int:
    """A slot's size: slots begin where a mapping may."""
    return -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def check_room(folder: Path, size: int, blocks: int = 0) -> int:
    """The free bytes of a folder's disk.

    Args:
        folder: of the scratch file.
        size: of it, in bytes.
        blocks: bytes of finished blocks that the same disk must hold too.

    Raises:
        OutputError: they are fewer than these together, or there is no such folder.
    """
    if not folder.is_dir():
        raise OutputError(f"--scratch {folder}: no such folder. Make it first.")
    need = f"hidden states need {size:,} bytes of scratch{f', beside {blocks:,} of finished blocks,' if blocks else ''}"
    instead = "Name a folder on another disk with --scratch, say --scratch-dtype bfloat16, or use fewer --samples."
    return _free(folder, size + blocks, need, instead)


def check_kept(folder: Path, size: int) -> None:
    """Raise if a folder's disk cannot hold what is kept of finished blocks.

    Raises:
        OutputError: with the numbers.
    """
    need = f"finished blocks need {size:,} bytes"
    _free(folder, size, need, "Write OUT on another disk, or say --dtype bfloat16.")


def _free(folder: Path, size: int, need: str, instead: str) -> int:
    """The free bytes of a folder's disk, where they are enough."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(f"{need} in {folder}, and {free:,} are free there. {instead}")
    return free


def _allocated(path: Path, size: int) -> int:
    """A new open file with that many bytes of disk behind it."""
    try:
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened, 0, max(size, 1))
            else:
                os.ftruncate(opened, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                os.close(opened)
                path.unlink(missing_ok=True)
                raise
            os.ftruncate(opened, size)
    except OSError as error:
        raise OutputError(f"{path}: {size:,} bytes of scratch cannot be had: {reason(error)}.") from error
    return opened
