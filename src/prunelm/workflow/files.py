"""The files of a run: where the model comes from, what it is calibrated on, how it is written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..allocation import Outlook
from ..calibration import calibrated_recipe, calibration_digest, fingerprint, load_calibration
from ..checkpoint import save
from ..data import Batches
from ..errors import DataError, RecipeError
from ..job import first_channels_, prepare_
from ..journal import Journal
from ..loading import Source, find_model, load_model, load_tokenizer, sha256_of, skeleton, stored_dtype
from ..perplexity_limit import Held
from ..pressing import Pressing
from ..pruning import Report
from ..recipe import Recipe
from ..registry import did_you_mean
from ..results import versions
from ..spreading import gathered
from ..stream import Room
from ..streaming import Streaming, Tell, streamed
from ..workbench import Workbench, lasting
from ..writing import check_target
from . import DEFAULT_RECIPE
from .inspecting import planned
from .texts import calibration_batches, check_reads, plain, read_text

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Announce = Callable[[Sequence[str]], None]
"""Told what a user must know before work begins."""


def silently(_notes: Sequence[str]) -> None:
    """Tell nobody."""


def check_no_hidden(recipe: Recipe, what: str) -> None:
    """Raise if a recipe removes hidden channels where that would mean something else.

    Raises:
        RecipeError: names what it does not go with.
    """
    if recipe.hidden:
        raise RecipeError(f"hidden {recipe.hidden:g} does not go with {what}: leave one of the two out")


def recipe_or_default(
    recipe: str | Path | Recipe | None,
    calibrated: str | Path | None = None,
    *,
    default: str = DEFAULT_RECIPE,
    **overrides: Any,
) -> Recipe:
    """The recipe that is named or given; without either that of a saved calibration, or else the default one.

    Raises:
        RecipeError: there is no such recipe, or something that it does not know is to be replaced in it.
    """
    if isinstance(recipe, Recipe):
        return recipe.replaced(**overrides)
    if recipe is None and calibrated is not None:
        return calibrated_recipe(calibrated, **overrides)
    return Recipe.load(recipe or default, **overrides)


def check_plan_alone(plan: str | Path | None, said: Mapping[str, Any]) -> None:
    """Raise if a recipe, or something of one, is said beside a plan, which holds its own; None says nothing.

    Raises:
        RecipeError: names what was said.
    """
    named = ", ".join(name for name, value in said.items() if value is not None)
    if plan is not None and named:
        raise RecipeError(f"{plan} holds its recipe, so {named} cannot be said here: edit it there.")


def dtype_named(name: str, what: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        RecipeError: no such dtype.
    """
    if name not in DTYPES:
        raise RecipeError(f"{what} must be one of {', '.join(DTYPES)}, got {name!r}. {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a run: where the model comes from, what it is calibrated on, how it is written."""

    source: Source
    tokenizer: PreTrainedTokenizerBase | None
    documents: list[str] | None
    labels: list[int] | None
    reads: bool
    text: Path | None
    dtype: torch.dtype
    compute_dtype: torch.dtype
    force: bool
    notes: list[str]

    def load(self) -> PreTrainedModel:
        """The dense model, in the dtype that it computes in."""
        return load_model(self.source, dtype=self.compute_dtype)

    def task(
        self, sizes: Sequence[Recipe], journal: str | Path | None, calibrated: str | Path | None = None
    ) -> dict[str, Any]:
        """All that was asked, as plain data from which `resume` asks for it again."""
        return {
            "model": lasting(self.source.name),
            "recipe": sizes[0].to_dict(),
            "sparsities": [size.sparsity for size in sizes],
            "text": lasting(self.text),
            "calibrated": lasting(calibrated),
            "journal": None if journal is None else str(Path(journal).absolute()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.source.where,
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "trust_remote_code": self.source.trust_remote_code,
            "allow_pickle": self.source.allow_pickle,
        }

    def inputs(
        self,
        calibration: Batches,
        refit: Batches | None = None,
        calibrated: str | Path | None = None,
        plan: str | Path | None = None,
        held: Held | None = None,
    ) -> dict[str, Any]:
        """What the work is made of, so that other inputs are noticed when it goes on."""
        texts = {"calibration": calibration, "refit": refit}
        facts = {name: plain(read.facts) for name, read in texts.items() if read is not None}
        seen = calibration_digest(calibrated) if calibrated is not None else None
        decided = sha256_of(Path(plan)) if plan is not None else None
        found = {"model": fingerprint(self.source), **facts, "calibrated": seen, "plan": decided}
        return found if held is None else {**found, "held_out_text": held.digest}

    def read(
        self,
        dense: PreTrainedModel,
        recipe: Recipe,
        batch_tokens: int,
        bench: Workbench,
        otherwise: str = ", or --reconstruction none",
    ) -> tuple[Batches, Batches | None]:
        """What criteria read, and what the reconstruction reads where that is something else; beside the model."""
        return calibration_batches(
            dense,
            self.tokenizer if self.reads else None,
            recipe,
            self.documents,
            labels=self.labels,
            name=self.text.name if self.text is not None else None,
            batch_tokens=batch_tokens,
            bench=bench,
            otherwise=otherwise,
        )

    @contextmanager
    def opened(
        self, recipe: Recipe, how: Streaming | None, out: Path, bench: Workbench, tell: Tell
    ) -> Iterator[tuple[PreTrainedModel, Room, Pressing | None]]:
        """The dense model, where its blocks and states are, and what writes its blocks if they are streamed."""
        if how is None:
            yield self.load(), Room(), None
            return
        dtypes = {"compute_dtype": self.compute_dtype, "dtype": self.dtype}
        with streamed(self.source, recipe, how, out, bench, tell=tell, **dtypes) as (pressing, room):
            yield pressing.shelf.model, room, pressing

    def save(self, pruned: PreTrainedModel, report: Report, out: Path, pressing: Pressing | None = None) -> None:
        """Write the pruned model, or finish what has written its blocks."""
        if pressing is None:
            pruned = gathered(pruned)
        if self.dtype != stored_dtype(self.source):
            report.dtypes["dtype"] = str(self.dtype).removeprefix("torch.")
        options: dict[str, Any] = {"source": self.source, "tokenizer": self.tokenizer, "dtype": self.dtype}
        save(pruned, report, out, force=self.force, pressing=pressing, **options)


def files_of_run(
    model: str | Path,
    sizes: Sequence[Recipe],
    folders: Sequence[Path],
    text: str | Path | None,
    dtype: str | None,
    force: bool,
    access: dict[str, Any],
    compute_dtype: str,
    *,
    seen: bool = False,
    edited: bool = False,
) -> Files:
    """The files of a run, checked before any weight is read: the recipe's text, the targets, the budgets, the disk.

    `seen`: a saved calibration is there; `edited`: the recipe comes as it is, and nothing can be said beside it.
    """
    chosen = sizes[0]
    reads = chosen.reads_text and not (seen and not chosen.reads_pruned)
    if text is not None:
        check_reads(chosen)
    if text is None and reads and chosen.calibration == "text":
        otherwise = "" if edited else ", or --self-generated"
        raise DataError(f"recipe {chosen.name!r} reads calibration text: give --text FILE{otherwise}")
    for folder in folders:
        if len(folders) == 1 or folder.parent.is_dir():
            check_target(folder, force=force)
    source = find_model(model, **access)
    if source.spread and chosen.hidden:
        raise RecipeError(
            "hidden channels go from all blocks at once, and --device auto has them on several GPUs: name one device, "
            "or leave --hidden out"
        )
    written = dtype_named(dtype, "dtype") if dtype else stored_dtype(source)
    need, notes = 0, []
    for size in sizes:
        shapes = skeleton(source)
        plan = planned(shapes, prepare_(shapes, size, narrow_hidden=first_channels_))
        need += plan["parameters"] * written.itemsize
        notes += plan["notes"]
    check_target(folders[0] if len(folders) == 1 else folders[0].parent, force=True, need_bytes=need)
    documents, labels = read_text(text, chosen) if text is not None and reads else (None, None)
    return Files(
        source=source,
        tokenizer=load_tokenizer(source) if reads or source.gguf else None,
        documents=documents,
        labels=labels,
        reads=reads,
        text=Path(text) if text else None,
        dtype=written,
        compute_dtype=dtype_named(compute_dtype, "compute dtype"),
        force=force,
        notes=list(dict.fromkeys(notes)),
    )


def seen_before(
    calibrated: str | Path | None, files: Files, recipe: Recipe, journal: str | Path | None
) -> Outlook | None:
    """What a saved calibration says of the very model, recipe and data type of a run; None where there is none.

    Raises:
        CalibrationError: it is of another one; says what differs.
        RecipeError: a journal is given for a search that is not made again.
    """
    if calibrated is None:
        return None
    if journal is not None:
        raise RecipeError("what a search found is in the saved calibration, and none is made here: leave --journal out")
    return load_calibration(calibrated, source=files.source, recipe=recipe, compute_dtype=files.compute_dtype)


def journal_of(
    path: str | Path | None, source: Source, sizes: Sequence[Recipe], calibration: Batches
) -> Journal | None:
    """The journal of a search, which belongs to one model, recipe and text.

    Raises:
        CalibrationError: the file is the journal of another search.
        RecipeError: the recipe makes no search.
    """
    if path is None:
        return None
    if not sizes[0].searches:
        raise RecipeError(f"recipe {sizes[0].name!r} makes no search that a journal could keep: leave it out")
    facts: dict[str, Any] = {
        "model": fingerprint(source),
        "recipes": [r.to_dict() for r in sizes],
        "calibration": calibration.facts,
    }
    facts |= {"versions": versions(), "threads": torch.get_num_threads(), "device": source.where}
    return Journal(Path(path), facts)
