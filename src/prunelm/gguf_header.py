"""The header of a GGUF file, read without believing any number in it: all that it names must lie in the file."""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MOST_AXES = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_WHOLE = (0, 1, 2, 3, 4, 5, 10, 11)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a header says: the byte behind the last tensor's data, how many tensors, numbers in them, and blocks."""

    end: int
    tensors: int
    numbers: int
    blocks: int


def gguf_header(path: Path) -> GgufHeader:
    """The sizes that a header names; nothing is read or allocated that the file does not hold.

    Raises:
        OSError: it cannot be read.
        ValueError: no GGUF file, or a header that runs out of the file; says at which byte.
    """
    with path.open("rb") as opened:
        if path.stat().st_size == 0:
            raise ValueError("the file is empty")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Bytes(data).header()


class _Bytes:
    """A place in the bytes of a header, which never goes beyond them."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 0, "<"

    def header(self) -> GgufHeader:
        """See `gguf_header`."""
        if self._bytes(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = struct.unpack("<I", self._bytes(4))
        if version & 0xFFFF == 0:
            self.order, version = ">", version >> 24
        if version not in VERSIONS:
            raise ValueError(f"version {version} is none of {', '.join(map(str, VERSIONS))}")
        tensors, fields = self._number("Q"), self._number("Q")
        alignment, blocks = ALIGNMENT, 0
        for _ in range(fields):
            name, kind = self._string(), self._number("I")
            if name == b"general.alignment" and kind == _UINT32:
                alignment = self._number("I")
            elif name.endswith(b".block_count") and kind in _WHOLE:
                blocks = max(blocks, self._number(_SCALARS[kind]))
            else:
                self._pass_value(kind)
        if alignment == 0 or alignment & (alignment - 1):
            raise ValueError(f"the alignment {alignment} is no power of two")
        behind = numbers = 0
        for _ in range(tensors):
            end, count = self._tensor()
            behind, numbers = max(behind, end), numbers + count
        start = self.at + -self.at % alignment
        return GgufHeader(end=start + behind if tensors else 0, tensors=tensors, numbers=numbers, blocks=blocks)

    def _tensor(self) -> tuple[int, int]:
        """The byte behind a tensor's data, counted from where data begin, and how many numbers they are."""
        name, axes = self._string(), self._number("I")
        if axes > MOST_AXES:
            raise ValueError(f"tensor {name[:60]!r} has {axes:,} axes")
        shape = [self._number("Q") for _ in range(axes)]
        kind, offset = self._number("I"), self._number("Q")
        if kind not in set(GGMLQuantizationType):
            raise ValueError(f"tensor {name[:60]!r} is of the unknown type {kind}")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        return offset + prod(shape) // int(block) * int(size), prod(shape)

    def _pass_value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            item, count = self._number("I"), self._number("Q")
            if item in _SCALARS:
                self._skip(count * struct.calcsize(_SCALARS[item]))
            elif item == _STRING:
                for _ in range(count):
                    self._skip(self._number("Q"))
            else:
                raise ValueError(f"an array of type {item} before byte {self.at:,}")
        elif kind in _SCALARS:
            self._skip(struct.calcsize(_SCALARS[kind]))
        else:
            raise ValueError(f"a value of the unknown type {kind} before byte {self.at:,}")

    def _number(self, form: str) -> int:
        return int(struct.unpack(self.order + form, self._bytes(struct.calcsize(form)))[0])

    def _string(self) -> bytes:
        return self._bytes(self._number("Q"))

    def _bytes(self, count: int) -> bytes:
        self._skip(count)
        return self.data[self.at - count : self.at]

    def _skip(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"{count:,} bytes are named at byte {self.at:,}, and the file ends at {len(self.data):,}")
        self.at += count
