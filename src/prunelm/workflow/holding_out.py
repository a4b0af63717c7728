"""The text that a limit of perplexity is measured on, kept from calibration."""

from dataclasses import replace
from pathlib import Path

from ..data import JOIN, read_documents
from ..errors import DataError
from ..limits import Limit, MaxPerplexity
from ..perplexity_limit import Held, split_off
from .files import Files


def held_out_of(
    files: Files, limit: Limit | None, text: str | Path | None, other: str | Path | None
) -> tuple[Files, Held | None]:
    """The files without the text that a limit of perplexity is measured on, and that text.

    Raises:
        DataError: there is none, it is too short, or it calibrates too; or nothing is measured on it.
    """
    if not isinstance(limit, MaxPerplexity):
        if other is not None:
            raise DataError(f"--held-out-text {other} is what --max-ppl is measured on, and no --max-ppl is given.")
        return files, None
    if other is not None:
        if text is not None and Path(other).resolve() == Path(text).resolve():
            raise DataError(f"{other} calibrates, so no perplexity on it counts: give another --held-out-text.")
        return files, Held(name=Path(other).name, text=JOIN.join(read_documents(other)))
    if text is None:
        raise DataError(f"--max-ppl {limit.said} is measured on text: give --held-out-text FILE.")
    if files.labels is not None:
        raise DataError(f"--max-ppl {limit.said}: labeled text cannot be split: give --held-out-text FILE.")
    kept, held = split_off(files.documents or read_documents(text), Path(text).name)
    return replace(files, documents=kept if files.documents is not None else None), held
