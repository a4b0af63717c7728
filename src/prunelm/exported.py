"""What an export to another program's format left."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written: where, the architecture's name in that format, the type of the matrices, bytes, and notes.

    `proof` says how it was checked before it was kept.
    """

    path: Path
    architecture: str
    type: str
    bytes: int
    proof: str
    notes: list[str]


def bytes_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
