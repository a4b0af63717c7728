"""Pruning with one block in memory at a time: which recipes allow it, where hidden states wait, and what that takes."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .allocators import ALLOCATORS
from .criteria import CRITERIA
from .distributed import rank, wait_for_all
from .distributed import size as processes
from .errors import RecipeError
from .heap import large_returned
from .loading import Source
from .pressing import Pressing
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .scratch import FILE, SPARE, Scratch, check_kept, check_room, rounded
from .shelf import Shelf, check_plain
from .sites import find_sites, weight_of
from .stream import Batch, Room, States
from .verify import PROOF_TOKENS, proof_inputs
from .workbench import Workbench, place_of

Tell = Callable[[str], None]
"""Called with a sentence that the user should read now."""
WHOLE = frozenset({"gradients", "importance", "gates"})
"""Statistics that need backward passes of the whole model."""
SUMS = {"float64": torch.float64, "float32": torch.float32}


def tell_nobody(line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How a run streams: the folder of its scratch file (the working folder by default), and two dtypes.

    `scratch_dtype`: what hidden states wait in between blocks; as computed by default. `sums`: what statistics are
    summed in.
    """

    scratch: Path | None = None
    scratch_dtype: torch.dtype | None = None
    sums: torch.dtype = torch.float64

    @property
    def dtypes(self) -> dict[str, str]:
        """The data types that change numbers, by their names in `pruning.json`."""
        found = {}
        if self.scratch_dtype is not None:
            found["scratch_dtype"] = _word(self.scratch_dtype)
        if self.sums != torch.float64:
            found["statistics_dtype"] = _word(self.sums)
        return found

    @property
    def notes(self) -> list[str]:
        """What changes numbers."""
        said = {
            "scratch_dtype": "hidden states waited between blocks as",
            "statistics_dtype": "statistics were summed in",
        }
        return [f"{said[name]} {dtype}" for name, dtype in self.dtypes.items()]


def streaming(
    recipe: Recipe, source: Source, scratch: str | Path | None, scratch_dtype: torch.dtype | None, sums: str
) -> Streaming:
    """How a recipe streams, once it is clear that it can.

    Raises:
        RecipeError: a part of it needs the whole model, which it names with what to use in its place; or no such dtype.
        OutputError: no such scratch folder.
    """
    if sums not in SUMS:
        raise RecipeError(f"--statistics-dtype must be one of {', '.join(SUMS)}, got {sums!r}.")
    check_streams(recipe, source)
    folder = None if scratch is None else Path(scratch)
    if folder is not None:
        check_room(folder, 0)
    return Streaming(scratch=folder, scratch_dtype=scratch_dtype, sums=SUMS[sums])


def check_streams(recipe: Recipe, source: Source) -> None:
    """Raise if a part of a recipe needs the whole model at once.

    Raises:
        RecipeError: names that part, and what to use in its place.
    """
    for part, instead in _whole(recipe):
        raise RecipeError(f"--stream holds one block at a time, and {part} needs the whole model: {instead}")
    check_plain(source)


def _whole(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(part, what to use in its place) of everything in a recipe that needs the whole model."""
    if recipe.hidden:
        yield "hidden, which repairs every layer beside its dense self,", "leave --hidden out"
    if recipe.policy is not None:
        yield "a policy search", "use another recipe, such as obs"
    if recipe.calibration == "self-generated":
        yield "self-generated text", "give --text FILE"
    if recipe.judges_plans:
        instead = "say rounds = 0 and candidates = 1 in a recipe file, or use --allocator error-curve"
        yield f"allocator {recipe.allocator!r}, which measures plans,", instead
    if recipe.choose_share:
        yield "choose_share", "say dense_share in the recipe file"
    if recipe.natural_steps:
        yield "natural_steps, which differentiate it,", "say --natural-steps 0"
    for name in recipe.sites:
        scoring = recipe.scoring(name)
        if CRITERIA[scoring.criterion].needs(**scoring.options) & WHOLE:
            yield f"criterion {scoring.criterion!r}, which reads gradients,", "use --criterion obs or wanda-sp"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def streamed(
    source: Source,
    recipe: Recipe,
    how: Streaming,
    out: Path,
    bench: Workbench,
    *,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    tell: Tell = tell_nobody,
) -> Iterator[tuple[Pressing, Room]]:
    """What writes the blocks of a streamed run as they are finished, and where its streams find blocks and states.

    Args:
        source: the dense model, in .safetensors files.
        recipe: all that is done.
        how: it streams.
        out: the folder that will be written.
        bench: keeps finished blocks.
        compute_dtype: of the block in memory.
        dtype: of the written weights.
        tell: told how large the scratch file is before it is made.

    Raises:
        OutputError: the disk cannot hold the finished blocks or the scratch file; with the numbers.
        CheckpointError: the weights are not in files under their names.
    """
    shelf = Shelf(source, compute_dtype)
    ids = proof_inputs(shelf.model.config.vocab_size, PROOF_TOKENS)
    pressing = Pressing(shelf, dtype, bench, ids)
    files: list[Scratch] = []
    folder = _folder(how.scratch, out, bench)
    kept = _kept_bytes(shelf, recipe, compute_dtype, dtype) if bench.folder is not None else 0
    if bench.folder is not None and not bench.done:
        tell(f"streaming: finished blocks take at most {kept:,} bytes in {bench.folder}")
        check_kept(bench.folder, kept)

    def states(batches: Sequence[Batch], layers: int = streams_of(recipe), name: str = FILE) -> States:
        if not batches:
            return []
        for file in [file for file in files if file.idle]:
            files.remove(file)
            file.close()
        wide = (how.scratch_dtype or compute_dtype).itemsize * int(shelf.model.config.hidden_size)
        slot = max(batch["input_ids"].numel() for batch in batches) * wide
        slots = layers * len(batches) + SPARE
        block = sum(p.numel() for p in shelf.blocks[0].parameters()) * compute_dtype.itemsize
        size = slots * rounded(slot)
        place = folder if folder == bench.folder else folder.parent
        free = check_room(place, size, _still_to_keep(kept, place, bench))
        each = f" on each of {processes()} processes" if processes() > 1 else ""
        tell(
            f"streaming: one of {len(shelf.blocks)} blocks of {block:,} bytes in memory at a time{each}, {size:,} "
            f"bytes of scratch in {folder} ({free:,} free)"
        )
        folder.mkdir(exist_ok=True)
        files.append(Scratch(folder, slots, slot, how.scratch_dtype, name=name))
        return files[-1].states()

    deep = partial(states, layers=len(shelf.blocks) + 2, name="entering.bin")
    room = Room(opened=shelf.opened, finished=pressing.finished, states=states, deep=deep, sums=how.sums)
    try:
        with large_returned():
            yield pressing, room
    finally:
        for file in files:
            file.close()
        if folder != bench.folder:
            shutil.rmtree(folder, ignore_errors=True)
    wait_for_all()


def _folder(scratch: Path | None, out: Path, bench: Workbench) -> Path:
    """The folder of this process's scratch files: that of the unfinished work, or one of its own for the time being.

    Other processes than the first have no bench; where they do not even see its folder, theirs lies beside `out`.
    """
    if scratch is None and bench.folder is not None:
        return bench.folder
    number = f"-{rank()}" if rank() else ""
    work = place_of(out)
    return (scratch or (work if work.is_dir() else work.parent)) / f"prunelm-{_digest(out)}{number}"


def _kept_bytes(shelf: Shelf, recipe: Recipe, compute_dtype: torch.dtype, dtype: torch.dtype) -> int:
    """What finished blocks take on disk at most: as they are written, and what is solved of them for `--resume`."""
    written = sum(p.numel() for block in shelf.blocks for p in block.parameters()) * dtype.itemsize
    stage = RECONSTRUCTIONS[recipe.reconstruction].stage
    sites = [site for site in find_sites(shelf.model, recipe.unit) if site.name in recipe.sites and stage != "none"]
    slots = [slot for site in sites for slot in ((*site.producers,) if stage == "refit" else ()) + (site.consumer,)]
    return written + sum(weight_of(slot.layer).numel() for slot in slots) * compute_dtype.itemsize


def _still_to_keep(kept: int, place: Path, bench: Workbench) -> int:
    """What finished blocks will yet take of the disk that a folder is on; nothing where they lie on another."""
    if bench.folder is None or not place.is_dir() or place.stat().st_dev != bench.folder.stat().st_dev:
        return 0
    return max(0, kept - sum(file.stat().st_size for file in bench.folder.rglob("*.safetensors")))


def streams_of(recipe: Recipe) -> int:
    """How many streams with hidden states of their own a recipe runs at once."""
    chosen = RECONSTRUCTIONS[recipe.reconstruction]
    beside = chosen.stage == "refit" or (chosen.stage == "repair" and recipe.dense_share > 0)
    return 2 if beside or ALLOCATORS[recipe.allocator].needs is not None else 1


def _digest(out: Path) -> str:
    return hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]
