"""What the commands do, as functions: inspect, prune, evaluate, compare."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .allocation import Outlook, look_at
from .calibration import calibration_digest, fingerprint, load_calibration, save_calibration
from .checkpoint import save
from .data import JOIN, Batches, read_documents, read_labeled, sample_batches
from .distributed import is_writer, shared_by
from .distributed import size as size_of_run
from .errors import BudgetError, CheckpointError, DataError, RecipeError
from .evaluation import Evaluation, check_tokenizers
from .evaluation import evaluate as evaluate_model
from .family import prune_family
from .generate import random_tokens, self_generated
from .job import Job, first_channels_, plan_counts, prepare_
from .journal import Journal, own_journal
from .limits import Limit, MaxPerplexity, said_as
from .loading import Source, bytes_on_disk, find_dense, find_model, load_model, load_tokenizer, skeleton, stored_dtype
from .matching import matched_units, planned_units
from .memory import batch_tokens_on, within_memory
from .perplexity_limit import Held, split_off
from .placement import CPU
from .plan import prunable
from .pressing import Pressing
from .progress import Progress, named, silent
from .pruning import Report, repair_
from .quantizing import check_formats, quantized_rows
from .recipe import Recipe
from .reconstructions import RECONSTRUCTIONS
from .registry import did_you_mean
from .results import versions
from .sites import Site, find_sites, weight_of
from .sized_pruning import Run, prune_sized, prune_within, sized_by
from .speed import prefill_speed
from .stock import stock_config
from .stream import Room
from .streaming import Streaming, Tell, streamed, streaming, tell_nobody
from .tasks import task_of
from .workbench import Step, Workbench, workbench
from .writing import check_target, writes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_RECIPE = "goa-budget"
Announce = Callable[[Sequence[str]], None]
"""Told what a user must know before work begins."""


def silently(_notes: Sequence[str]) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A model's sites and what usual budgets would mean; no weight was read."""

    name: str
    model_type: str
    parameters: int
    prunable: int
    blocks: int
    sites: list[Site]
    budgets: list[dict[str, Any]]


def inspect(model: str | Path, *, unit: str = "group", **access: Any) -> Inspection:
    """The sites of a model, the cost of their units, and what 10, 20 and 30 % would leave, from its config alone.

    Raises:
        CheckpointError: no such model, or damaged.
        UnsupportedModelError: unknown family.
    """
    source = find_model(model, **access)
    shapes = skeleton(source)
    sites = find_sites(shapes, unit)
    budgets = []
    for sparsity in (0.1, 0.2, 0.3):
        try:
            job = plan_counts(shapes, Recipe.load(DEFAULT_RECIPE, sparsity=sparsity, unit=unit))
        except BudgetError as error:
            budgets.append({"sparsity": sparsity, "error": str(error)})
        else:
            budgets.append({"sparsity": sparsity, **planned(shapes, job)})
    return Inspection(
        name=source.name,
        model_type=shapes.config.model_type,
        parameters=sum(p.numel() for p in shapes.parameters()),
        prunable=prunable(sites),
        blocks=len({site.block for site in sites}),
        sites=sites,
        budgets=budgets,
    )


def planned(model: PreTrainedModel, job: Job) -> dict[str, Any]:
    """What a job will remove: parameters, and the widths that stay.

    Where widths are decided by measurements, `removed` is the budget, met within one unit, and `kept` is empty.
    """
    removed = job.budget.target
    before = sum(p.numel() for p in model.parameters())
    widths: dict[str, list[int]] = {}
    if job.counts is not None:
        removed = sum((site.n_units - job.keeps(site)) * site.cost for site in job.sites)
        for site in job.sites:
            widths.setdefault(site.name, []).append(job.keeps(site))
    if job.narrowed:
        widths["hidden"] = [int(model.config.hidden_size)]
    gone = removed + job.narrowed + job.outside
    return {
        "removed": gone,
        "parameters": before - removed,
        "share_of_blocks": (removed + job.narrowed) / job.prunable,
        "share_of_model": gone / (before + job.narrowed + job.outside),
        "kept": {name: sorted(set(counts)) for name, counts in widths.items()},
        "notes": job.notes,
    }


def dry_run(
    model: str | Path,
    recipe: Recipe,
    *,
    plan: str | Path | None = None,
    limit: Limit | None = None,
    **access: Any,
) -> dict[str, Any]:
    """What `prune` would remove under a recipe, a plan or a limit, from the model's config alone.

    Raises:
        BudgetError: the limit is met by measuring pruned models.
    """
    if isinstance(limit, MaxPerplexity):
        raise BudgetError("--max-ppl is met by measuring pruned models: there is no dry run of that.")
    source = find_model(model, **access)
    size = sized_by(plan, limit, source, recipe)
    counts = size.decided.counts if size.decided is not None else None
    shapes = skeleton(source)
    found = planned(shapes, prepare_(shapes, size.recipe, narrow_hidden=first_channels_, counts=counts))
    return {**found, "notes": [*size.notes, *found["notes"]], "recipe": size.recipe.to_dict()}


@writes
def prune(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    text: str | Path | None = None,
    calibrated: str | Path | None = None,
    journal: str | Path | None = None,
    plan: str | Path | None = None,
    limit: Limit | None = None,
    held_out_text: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compute_dtype: str = "float32",
    stream: bool = False,
    scratch: str | Path | None = None,
    scratch_dtype: str | None = None,
    statistics_dtype: str = "float64",
    force: bool = False,
    tell: Tell = tell_nobody,
    progress: Progress = silent,
    announce: Announce = silently,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Report:
    """Prune a model into a folder that opens elsewhere, proven in a fresh process before this returns.

    Args:
        model: a Hugging Face folder, a hub name, or a .gguf file.
        out: folder to write.
        recipe: a name, a TOML file, or a `Recipe`.
        text: calibration text; see `read_documents`. Not needed where the recipe reads none or generates its own.
        calibrated: a folder of `calibrate`, in place of looking at the dense model again; text is still needed where
            the recipe repairs.
        journal: a file for the search for widths, where the recipe makes one: written as it goes, and read when it is
            there, so that an interrupted search goes on where it stopped.
        plan: a file of `prunelm.plan`, edited or not, which says the recipe and what stays in each site.
        limit: a budget in other units, in place of the recipe's sparsity; see `prunelm.limit_of`.
        held_out_text: what a limit of perplexity is measured on; by default the last tenth of `text`, which then
            calibrates nothing.
        dtype: of the written weights: float32, float16 or bfloat16; as stored by default.
        device: where the model computes: `cpu`, `cuda`, `cuda:1` or `mps`; by default a GPU of CUDA where there is one.
        compute_dtype: of the model while it is pruned; statistics and solves are in float64 whatever it is.
        stream: hold one block in memory at a time; the bytes of the weights are the same.
        scratch: folder for the hidden states of a streamed run; its working folder by default.
        scratch_dtype: what they wait in; as computed by default.
        statistics_dtype: what a streamed run sums statistics in: float64 or float32.
        force: replace `out` if it exists.
        tell: called with sentences to read before the work begins.
        progress: called with (stage, done, total).
        announce: called with what a user must know, before anything is computed.
        trust_remote_code: run modeling code that comes with the checkpoint.
        allow_pickle: accept pickle weights.
        overrides: recipe fields to replace, as in `sparsity=0.3`.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, **overrides)
    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    check_target(out, force=force)
    size = sized_by(plan, limit, find_model(model, **access), chosen, progress=progress)
    if calibrated is not None:
        _check_no_hidden(size.recipe, "a saved calibration, which has seen all the channels")
    seen = calibrated is not None
    files = _files(model, [size.recipe], [Path(out)], text, dtype, force, access, compute_dtype, seen=seen)
    announce(files.notes)
    outlook = load_calibration(calibrated, source=files.source, recipe=size.recipe) if calibrated is not None else None
    looks = limit is not None and size.decided is None and size.recipe.decides_by_looking
    where: dict[str, Any] = {"scratch": scratch, "scratch_dtype": scratch_dtype, "statistics_dtype": statistics_dtype}
    looks = looks or isinstance(limit, MaxPerplexity)
    if stream and size_of_run() > 1:
        raise RecipeError("--stream holds one block on one process: leave it out, or run without torchrun")
    how = _streaming(size.recipe, files.source, looks=looks, **where) if stream else None
    if how is None and tuple(where.values()) != (None, None, "float64"):
        raise RecipeError("--scratch, --scratch-dtype and --statistics-dtype belong to --stream: say that too")
    files, held = _held_out(files, limit, text, held_out_text)
    task = {**files.task([chosen], journal, calibrated), "plan": _lasting(plan), "limit": said_as(limit)}
    task |= {"held_out_text": _lasting(held_out_text), "stream": stream, **where, "scratch": _lasting(scratch)}
    with workbench(out, task, command="prune", force=force) as bench:

        def pruned(batch_tokens: int) -> tuple[PreTrainedModel, Report, Pressing | None]:
            progress("loading", 0, 1)
            part = bench.part(f"batches-of-{batch_tokens}")
            with files.opened(size.recipe, how, Path(out), part, tell) as (dense, room, pressing):
                progress("loading", 1, 1)
                batches, refit = files.read(dense, size.recipe, batch_tokens, part)
                part.check(files.inputs(batches, refit, calibrated))
                run = Run(
                    source=files.source,
                    load=files.load,
                    recipe=chosen,
                    calibration=batches,
                    refit=refit,
                    outlook=outlook,
                    journal=_journal(journal, files.source, [size.recipe], batches),
                    bench=part,
                    room=room,
                    progress=progress,
                )
                if not isinstance(limit, MaxPerplexity):
                    return *prune_sized(run, dense, size, limit), pressing
                assert held is not None
                tokenizer = load_tokenizer(files.source)
                small = prune_within(run, dense, limit, held=held, tokenizer=tokenizer, dtype=files.dtype)
                return *small, pressing

        (small, report, pressing), notes = within_memory(pruned, files.source.device, size.recipe.length, progress)
        report.notes.extend([*notes, *(how.notes if how else []), *shared_by()])
        progress("saving", 0, 1)
        if is_writer():
            files.save(small, report, Path(out), pressing)
        progress("saving", 1, 1)
    return report


@writes
def prune_sizes(
    model: str | Path,
    out: str | Path,
    sparsities: Sequence[float],
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    text: str | Path | None = None,
    journal: str | Path | None = None,
    dtype: str | None = None,
    device: str | None = None,
    compute_dtype: str = "float32",
    force: bool = False,
    progress: Progress = silent,
    announce: Announce = silently,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> dict[Path, Report]:
    """Nested models of several sizes, one folder each below `out`, from one look at the dense model.

    The folders are named after the sparsities, as in `OUT/0.2`, and written one by one, the largest model first; each
    opens and is proven as that of `prune` is. For the arguments see there.

    Raises:
        PruneLMError: one line that says what to do; folders that were finished before stay.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, sparsity=min(sparsities), **overrides)
    _check_no_hidden(chosen, "several sizes at once, whose units are nested in the dense model")
    sizes = [replace(chosen, sparsity=sparsity) for sparsity in sorted(set(sparsities))]
    access = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    folders = [Path(out) / f"{size.sparsity:g}" for size in sizes]
    check_target(out, force=True)
    files = _files(model, sizes, folders, text, dtype, force, access, compute_dtype)
    announce(files.notes)
    reports = {}
    with workbench(out, files.task(sizes, journal), command="prune", force=force) as bench:
        calibration, refit = files.read(files.load(), chosen, batch_tokens_on(files.source.device), bench)
        bench.check(files.inputs(calibration, refit))
        if is_writer():
            Path(out).mkdir(exist_ok=True)
        family = prune_family(
            files.load,
            calibration,
            chosen,
            [size.sparsity for size in sizes],
            refit=refit,
            journal=_journal(journal, files.source, sizes, calibration),
            bench=bench,
            progress=progress,
        )
        for folder, (pruned, report) in zip(folders, family, strict=True):
            if is_writer():
                files.save(pruned, report, folder)
            reports[folder] = report
    return reports


def _check_no_hidden(recipe: Recipe, what: str) -> None:
    """Raise if a recipe removes hidden channels where that would mean something else.

    Raises:
        RecipeError: names what it does not go with.
    """
    if recipe.hidden:
        raise RecipeError(f"hidden {recipe.hidden:g} does not go with {what}: leave one of the two out")


@writes
def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "best",
    text: str | Path | None = None,
    journal: str | Path | None = None,
    device: str | None = None,
    compute_dtype: str = "float32",
    force: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    **overrides: Any,
) -> Outlook:
    """Look at a dense model once and save what was seen, for any number of prunes to any size.

    A later `prune(..., calibrated=out)` ranks units and divides its budget by it without a pass over the dense model;
    only repairs read text again. A search for budgets, where the recipe has one, is made at the recipe's sparsity.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, **overrides)
    access = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    _check_no_hidden(chosen, "a saved calibration, which serves any size")
    files = _files(model, [chosen], [Path(out)], text, None, force, access, compute_dtype)
    with workbench(out, files.task([chosen], journal), command="calibrate", force=force) as bench:

        def seen(batch_tokens: int) -> tuple[Outlook, Batches]:
            dense, part = files.load(), bench.part(f"batches-of-{batch_tokens}")
            batches, _ = files.read(dense, chosen, batch_tokens, part)
            part.check(files.inputs(batches))
            kept = _journal(journal, files.source, [chosen], batches)
            return look_at(dense, batches, chosen, prepare_(dense, chosen), progress, kept, part), batches

        (outlook, batches), notes = within_memory(seen, files.source.device, chosen.length, progress)
        outlook = replace(outlook, notes=[*outlook.notes, *notes, *shared_by()])
        if is_writer():
            save_calibration(outlook, out, source=files.source, recipe=chosen, text=batches.facts, force=force)
    return outlook


@writes
def repair(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    reconstruction: str = "least-squares",
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    **access: Any,
) -> Report:
    """Repair somebody's pruned model in closed form: the same units as it has, the kept weights solved again.

    The units are those that its pruning.json names, or else are found by matching producer rows with the dense model.
    What stays is taken from the dense model; other changes that came with the pruning are not.

    Args:
        dense: the model that was pruned.
        pruned: what was made of it: any folder of a known family with fewer units.
        out: folder to write.
        text: calibration text.
        reconstruction: which repair.
        samples, length, seed: of the calibration.
        dtype: of the written weights; that of `pruned` by default.
        force: replace `out` if it exists.
        progress: called with (stage, done, total).
        access: see `prune`.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    check_target(out, force=force)
    source, other = find_model(dense, **access), find_model(pruned, **access)
    _check_all_channels(other)
    documents = read_documents(text)
    model = load_model(source)
    if (other.plan() or {}).get("dropped_blocks"):
        raise BudgetError(f"{other.name} has lost whole blocks, and no unit of theirs stays that a repair could use.")
    planned_kept = planned_units(other.plan(), model)
    small = load_model(other)
    kept, unit = planned_kept or matched_units(model, small)
    how = "named in its pruning.json" if planned_kept else "found by matching producer rows"
    sites = [site for site in find_sites(model, unit) if site.key in kept]
    removed = sum((site.n_units - len(kept[site.key])) * site.cost for site in sites)
    if not removed:
        raise BudgetError(f"{other.name} has all the units of {source.name}: there is nothing to repair.")
    widths = {(site.name, len(kept[site.key])) for site in sites}
    blocks = {site.block for site in find_sites(model, unit)}
    even = len(widths) == len({site.name for site in sites}) == len(sites) / len(blocks)
    values = {name: value for site in sites for name, value in site.config_values(len(kept[site.key])).items()}
    recipe = Recipe.from_dict(
        {
            "name": "repair",
            "sparsity": removed / prunable(find_sites(model)),
            "unit": unit,
            "per_block": not even or stock_config(model.config, values) is None,
            "reconstruction": reconstruction,
            "ridge": 0.1,
            "held_out": 0.125,
            "samples": samples,
            "length": length,
            "seed": seed,
        }
    )
    tokenizer = load_tokenizer(source)
    calibration, _ = calibration_batches(model, tokenizer, recipe, documents, name=Path(text).name)
    notes = [f"the units are those of {Path(other.name).name}, {how}; the recipe's criteria chose nothing"]
    written = dtype_named(dtype, "dtype") if dtype else stored_dtype(other)
    task = {"dense": _lasting(source.name), "pruned": _lasting(other.name), "recipe": recipe.to_dict()}
    inputs = {"dense": fingerprint(source), "pruned": fingerprint(other), "calibration": _plain(calibration.facts)}
    task |= {"dtype": str(written), "device": str(source.device)}
    with workbench(out, task, command="repair", force=force) as bench:
        bench.check(inputs)
        report = repair_(model, calibration, recipe, kept, notes=notes, bench=bench, progress=progress)
        model.to(CPU)
        report.notes.extend(shared_by())
        if is_writer():
            save(model, report, out, source=source, tokenizer=tokenizer, dtype=written, force=force)
    return report


def _check_all_channels(pruned: Source) -> None:
    """Raise if a folder says that hidden channels went.

    Raises:
        CheckpointError: with both widths.
    """
    hidden = (pruned.plan() or {}).get("hidden")
    if hidden:
        raise CheckpointError(
            f"{pruned.name} has {len(hidden['kept'])} of {hidden['units']} hidden channels, and only units can be "
            "repaired afterwards: prune the dense model again, with a recipe that repairs"
        )


def dtype_named(name: str, what: str) -> torch.dtype:
    """The dtype of a name.

    Raises:
        RecipeError: no such dtype.
    """
    if name not in DTYPES:
        raise RecipeError(f"{what} must be one of {', '.join(DTYPES)}, got {name!r}. {did_you_mean(name, DTYPES)}")
    return DTYPES[name]


def _streaming(
    recipe: Recipe, source: Source, *, looks: bool, scratch: Any, scratch_dtype: str | None, statistics_dtype: str
) -> Streaming:
    """How a run streams.

    Raises:
        RecipeError: it cannot, or there is no such dtype.
    """
    if looks:
        raise RecipeError(
            "--stream holds one block at a time, and finding the sparsity for this size needs the whole model: say "
            "--sparsity, or a number of parameters with --allocator uniform"
        )
    waits = dtype_named(scratch_dtype, "--scratch-dtype") if scratch_dtype else None
    return streaming(recipe, source, scratch, waits, statistics_dtype)


@dataclass(frozen=True, kw_only=True)
class _Files:
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
        return load_model(self.source, dtype=self.compute_dtype)

    def task(
        self, sizes: Sequence[Recipe], journal: str | Path | None, calibrated: str | Path | None = None
    ) -> dict[str, Any]:
        """All that was asked, as plain data from which `resume` asks for it again."""
        return {
            "model": _lasting(self.source.name),
            "recipe": sizes[0].to_dict(),
            "sparsities": [size.sparsity for size in sizes],
            "text": _lasting(self.text),
            "calibrated": _lasting(calibrated),
            "journal": None if journal is None else str(Path(journal).absolute()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.source.device),
            "compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "trust_remote_code": self.source.trust_remote_code,
            "allow_pickle": self.source.allow_pickle,
        }

    def inputs(
        self, calibration: Batches, refit: Batches | None = None, calibrated: str | Path | None = None
    ) -> dict[str, Any]:
        """What the work is made of, so that other inputs are noticed when it goes on."""
        texts = {"calibration": calibration, "refit": refit}
        facts = {name: _plain(read.facts) for name, read in texts.items() if read is not None}
        seen = calibration_digest(calibrated) if calibrated is not None else None
        return {"model": fingerprint(self.source), **facts, "calibrated": seen}

    def read(
        self, dense: PreTrainedModel, recipe: Recipe, batch_tokens: int, bench: Workbench
    ) -> tuple[Batches, Batches | None]:
        return calibration_batches(
            dense,
            self.tokenizer if self.reads else None,
            recipe,
            self.documents,
            labels=self.labels,
            name=self.text.name if self.text is not None else None,
            batch_tokens=batch_tokens,
            bench=bench,
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
        if pressing is None:
            pruned.to(CPU)
        options: dict[str, Any] = {"source": self.source, "tokenizer": self.tokenizer, "dtype": self.dtype}
        save(pruned, report, out, force=self.force, pressing=pressing, **options)


def _files(
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
) -> _Files:
    """The files of a run, checked before any weight is read: the recipe's text, the targets, the budgets, the disk."""
    chosen = sizes[0]
    reads = chosen.reads_text and not (seen and chosen.reconstruction == "none")
    if text is not None and chosen.calibration == "self-generated":
        raise DataError("--text and self-generated calibration exclude each other: this recipe writes its own text")
    if text is None and reads and chosen.calibration == "text":
        raise DataError(f"recipe {chosen.name!r} reads calibration text: give --text FILE, or --self-generated")
    for folder in folders:
        if len(folders) == 1 or folder.parent.is_dir():
            check_target(folder, force=force)
    source = find_model(model, **access)
    written = dtype_named(dtype, "dtype") if dtype else stored_dtype(source)
    need, notes = 0, []
    for size in sizes:
        shapes = skeleton(source)
        plan = planned(shapes, prepare_(shapes, size, narrow_hidden=first_channels_))
        need += plan["parameters"] * written.itemsize
        notes += plan["notes"]
    check_target(folders[0] if len(folders) == 1 else folders[0].parent, force=True, need_bytes=need)
    documents, labels = _read_text(text, chosen) if text is not None and reads else (None, None)
    return _Files(
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


def _held_out(
    files: _Files, limit: Limit | None, text: str | Path | None, other: str | Path | None
) -> tuple[_Files, Held | None]:
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


def _read_text(text: str | Path, recipe: Recipe) -> tuple[list[str], list[int] | None]:
    """The documents of a text, with their labels where the recipe's loss reads some."""
    if recipe.loss != "task":
        return read_documents(text), None
    rows = read_labeled(text)
    return [document for document, _ in rows], [label for _, label in rows]


def _plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one calibration from another, without the n-grams, which follow from it."""
    return {name: value for name, value in facts.items() if name != "ngrams"}


def _lasting(place: str | Path | None) -> str | None:
    """A path that means the same from another folder; hub names stay."""
    return None if place is None else str(Path(place).resolve()) if Path(place).exists() else str(place)


def read_batches(model: PreTrainedModel, source: Source, recipe: Recipe, text: str | Path | None) -> Batches:
    """The batches that a recipe's criteria read, from a text file or by the model itself.

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    documents, labels = _read_text(text, recipe) if text is not None else (None, None)
    name = Path(text).name if text is not None else None
    return calibration_batches(model, load_tokenizer(source), recipe, documents, labels=labels, name=name)[0]


def _journal(path: str | Path | None, source: Source, sizes: Sequence[Recipe], calibration: Batches) -> Journal | None:
    """The journal of a search, which belongs to one model, recipe and text.

    Raises:
        CalibrationError: the file is the journal of another search.
        RecipeError: the recipe makes no search.
    """
    if path is None:
        return None
    if not sizes[0].rounds and sizes[0].policy is None:
        raise RecipeError(f"recipe {sizes[0].name!r} makes no search that a journal could keep: leave it out")
    facts = {"model": fingerprint(source), "recipes": [r.to_dict() for r in sizes], "calibration": calibration.facts}
    return Journal(Path(path), facts)


def calibration_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    documents: Sequence[str] | None,
    *,
    labels: Sequence[int] | None = None,
    name: str | None = None,
    batch_tokens: int | None = None,
    bench: Workbench | None = None,
) -> tuple[Batches, Batches | None]:
    """The batches that criteria read, and those that the reconstruction reads where they are others; beside the model.

    What the model wrote itself is kept on the bench.

    Raises:
        DataError: too little text for one window, or for as many tokens as the refit solves for channels.
    """
    if tokenizer is None or not recipe.reads_text:
        return Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none needed"}), None
    sizes = {"samples": recipe.samples, "length": recipe.length, "seed": recipe.seed}
    if documents is None:
        found = _kept_text(bench or Workbench(), lambda: self_generated(model, tokenizer, **sizes))
    else:
        causal = task_of(model) == "causal"
        at_once = batch_tokens or batch_tokens_on(model.device)
        found = sample_batches(
            documents, tokenizer, model.config, causal=causal, labels=labels, batch_tokens=at_once, **sizes
        )
        found.facts["source"] = name or "text"
    refit = random_tokens(model, tokenizer, **sizes) if recipe.covariance_text == "random-tokens" else None
    if RECONSTRUCTIONS[recipe.reconstruction].solves:
        _check_rank(model, refit or found, recipe)
    return found.to(model.device), refit.to(model.device) if refit is not None else None


def _kept_text(bench: Workbench, make: Callable[[], Batches]) -> Batches:
    """Token batches that an earlier run made, or else new ones."""
    step = bench.get("text")
    if step is None:
        made = make()
        bench.put("text", Step(facts=made.facts, tensors={f"{n}": b["input_ids"] for n, b in enumerate(made.batches)}))
        return made
    return Batches(batches=[{"input_ids": step.tensors[f"{n}"]} for n in range(len(step.tensors))], facts=step.facts)


def _check_rank(model: PreTrainedModel, found: Batches, recipe: Recipe) -> None:
    widest = max(weight_of(site.consumer.layer).shape[1] for site in find_sites(model, recipe.unit))
    if recipe.hidden:
        widest = max(widest, int(model.config.hidden_size))
    fitted = int(found.tokens * (1 - recipe.held_out))
    if fitted < widest:
        raise DataError(
            f"{fitted:,} calibration tokens cannot determine a refit of {widest:,} channels: at least "
            f"{widest:,} tokens are needed, {4 * widest:,} are better. Give more text, more --samples or --length, "
            "or --reconstruction none."
        )


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    length: int = 1024,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **access: Any,
) -> Evaluation:
    """The quality of a model on a text, alone or against its dense parent; see `prunelm.evaluation.evaluate`."""
    read_documents(text)
    source = find_model(model, **access)
    other = find_dense(against, source, **access) if against is not None else None
    tokenizer = load_tokenizer(source)
    if other is not None:
        check_tokenizers(tokenizer, load_tokenizer(other))
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "seed": seed}
    with own_journal(_evaluation_facts(source, other, text, sizes)) as journal:
        loaded = load_model(source)
        dense = load_model(other) if other is not None else None
        return evaluate_model(loaded, tokenizer, text, against=dense, journal=journal, progress=progress, **sizes)


def _evaluation_facts(
    source: Source, other: Source | None, text: str | Path, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """What tells one evaluation from another; files by size and time, which costs no reading."""
    facts: dict[str, Any] = {"text": _files_of(Path(text)), **sizes, "versions": versions()}
    for who, one in (("model", source), ("against", other)):
        facts[who] = None if one is None else [str(one.device), _files_of(one.folder / (one.gguf or ""))]
    return {**facts, "threads": torch.get_num_threads()}


def _files_of(place: Path) -> dict[str, list[int]]:
    """Size and time of a file, or of those in a folder, by path."""
    found = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    return {str(p.resolve()): [p.stat().st_size, p.stat().st_mtime_ns] for p in found}


def compare(
    models: Sequence[str | Path],
    text: str | Path | None = None,
    *,
    length: int = 1024,
    max_tokens: int | None = None,
    quantized: Sequence[str] = (),
    speed: bool = True,
    progress: Progress = silent,
    **access: Any,
) -> list[dict[str, Any]]:
    """One row per model, the first being the dense one that the others are compared with.

    Parameters, bytes of the weight files, quality where a text is given, and prefill tokens per second, each pair of
    dense and pruned model timed in turns (the dense row shows the last pair). With formats in `quantized`, bytes and
    quality of every model with its weights rounded to each, so that pruning can be held against quantization.

    Raises:
        BudgetError: no such format.
    """
    formats = check_formats(quantized)
    others = [find_model(model, **access) for model in models[1:]]
    sources = [find_dense(models[0], others[0], **access) if others else find_model(models[0], **access), *others]
    tokenizer = load_tokenizer(sources[0]) if text is not None else None
    for source in others if tokenizer is not None else []:
        check_tokenizers(load_tokenizer(source), tokenizer)
    dense = load_model(sources[0])
    rows = []
    for source in sources:
        model = dense if source is sources[0] else load_model(source)
        row: dict[str, Any] = {
            "model": source.name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": bytes_on_disk(source),
        }
        if tokenizer is not None and text is not None:
            against = None if model is dense else dense
            stage = named(progress, source.name)
            sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens}
            facts = _evaluation_facts(source, None if against is None else sources[0], text, sizes)
            with own_journal(facts) as journal:
                row["evaluation"] = evaluate_model(
                    model, tokenizer, text, against=against, journal=journal, progress=stage, **sizes
                ).to_dict()
        if formats:
            options: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "progress": progress}
            row["quantized"] = quantized_rows(model, tokenizer, text, formats, **options)
        rows.append(row)
        if speed and model is not dense:
            before, after = prefill_speed([dense, model])
            row |= {"tokens_per_second": after, "speedup": after / before}
            rows[0] |= {"tokens_per_second": before, "speedup": 1.0}
    return rows
