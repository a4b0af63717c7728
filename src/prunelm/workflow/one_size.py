"""Prune a model to one size, into one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..allocation import Outlook
from ..distributed import is_writer, shared_by
from ..errors import RecipeError
from ..limits import Limit, MaxPerplexity, said_as
from ..loading import Source, find_model, load_tokenizer
from ..memory import within_memory
from ..perplexity_limit import Held
from ..pressing import Pressing
from ..progress import Progress, silent
from ..pruning import Report
from ..recipe import Recipe
from ..sized_pruning import Run, found_by_looking, prune_sized, prune_within, sized_by
from ..sizing import Sized
from ..streaming import Streaming, Tell, streaming, tell_nobody
from ..workbench import Workbench, lasting, workbench
from ..writing import check_target, writes
from .files import (
    Announce,
    Files,
    check_no_hidden,
    check_plan_alone,
    dtype_named,
    files_of_run,
    journal_of,
    recipe_or_default,
    seen_before,
    silently,
)
from .holding_out import held_out_of


@writes
def prune(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | None = None,
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
        recipe: a name, a TOML file, or a `Recipe`; by default that of `calibrated`, or else `best-uniform`.
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
    check_plan_alone(plan, {"recipe": recipe, **overrides})
    chosen = recipe_or_default(recipe, calibrated, **overrides)
    access: dict[str, Any] = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle, "device": device}
    check_target(out, force=force)
    size = sized_by(plan, limit, find_model(model, **access), chosen, progress=progress)
    seen = calibrated is not None
    if seen:
        check_no_hidden(size.recipe, "a saved calibration, which has seen all the channels")
    kinds: dict[str, Any] = {"seen": seen, "edited": plan is not None}
    files = files_of_run(model, [size.recipe], [Path(out)], text, dtype, force, access, compute_dtype, **kinds)
    announce(files.notes)
    outlook = seen_before(calibrated, files, size.recipe, journal)
    waiting: dict[str, Any] = {"scratch": scratch, "scratch_dtype": scratch_dtype, "statistics_dtype": statistics_dtype}
    how = _streaming(stream, size, limit, files.source, **waiting)
    files, held = held_out_of(files, limit, text, held_out_text)
    task = {**files.task([chosen], journal, calibrated), "plan": lasting(plan), "limit": said_as(limit)}
    task |= {"held_out_text": lasting(held_out_text), "stream": stream, **waiting, "scratch": lasting(scratch)}
    run = _Prepared(
        files=files,
        recipe=chosen,
        size=size,
        limit=limit,
        held=held,
        how=how,
        outlook=outlook,
        calibrated=calibrated,
        journal=journal,
        plan=plan,
        out=Path(out),
    )
    with workbench(out, task, command="prune", force=force) as bench:
        return run.written(bench, tell, progress)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """All that was asked, checked and read before any weight is."""

    files: Files
    recipe: Recipe
    size: Sized
    limit: Limit | None
    held: Held | None
    how: Streaming | None
    outlook: Outlook | None
    calibrated: str | Path | None
    journal: str | Path | None
    plan: str | Path | None
    out: Path

    def written(self, bench: Workbench, tell: Tell, progress: Progress) -> Report:
        """The report of the pruned model, which is in its folder then."""

        def pruned(batch_tokens: int) -> tuple[PreTrainedModel, Report, Pressing | None]:
            return self._pruned(batch_tokens, bench.part(f"batches-of-{batch_tokens}"), tell, progress)

        device, length = self.files.source.device, self.size.recipe.length
        (small, report, pressing), notes = within_memory(pruned, device, length, progress)
        report.notes.extend([*notes, *(self.how.notes if self.how else []), *shared_by()])
        if self.calibrated is not None:
            report.asked["calibrated"] = Path(self.calibrated).name
        report.dtypes.update(self.how.dtypes if self.how else {})
        progress("saving", 0, 1)
        if is_writer():
            self.files.save(small, report, self.out, pressing)
        progress("saving", 1, 1)
        return report

    def _pruned(
        self, batch_tokens: int, bench: Workbench, tell: Tell, progress: Progress
    ) -> tuple[PreTrainedModel, Report, Pressing | None]:
        """The pruned model, the report, and what has written its blocks already, if anything."""
        files, recipe = self.files, self.size.recipe
        progress("loading", 0, 1)
        with files.opened(recipe, self.how, self.out, bench, tell) as (dense, room, pressing):
            progress("loading", 1, 1)
            batches, refit = files.read(dense, recipe, batch_tokens, bench)
            bench.check(files.inputs(batches, refit, self.calibrated, self.plan, self.held))
            run = Run(
                source=files.source,
                load=files.load,
                recipe=self.recipe,
                calibration=batches,
                refit=refit,
                outlook=self.outlook,
                journal=journal_of(self.journal, files.source, [recipe], batches),
                bench=bench,
                room=room,
                progress=progress,
            )
            if not isinstance(self.limit, MaxPerplexity):
                return *prune_sized(run, dense, self.size, self.limit), pressing
            assert self.held is not None
            tokenizer = load_tokenizer(files.source)
            small = prune_within(run, dense, self.limit, held=self.held, tokenizer=tokenizer, dtype=files.dtype)
            return *small, pressing


def _streaming(
    wanted: bool,
    size: Sized,
    limit: Limit | None,
    source: Source,
    *,
    scratch: str | Path | None,
    scratch_dtype: str | None,
    statistics_dtype: str,
) -> Streaming | None:
    """How a run streams, if that is wanted.

    Raises:
        RecipeError: it cannot, there is no such dtype, or options for it are given without it.
    """
    if not wanted:
        if (scratch, scratch_dtype, statistics_dtype) != (None, None, "float64"):
            raise RecipeError("--scratch, --scratch-dtype and --statistics-dtype belong to --stream: say that too")
        return None
    if source.spread:
        raise RecipeError(
            "--stream holds one block on one device, and --device auto means several GPUs: name one of them, or let "
            "torchrun start a process for each"
        )
    if found_by_looking(size, limit) or isinstance(limit, MaxPerplexity):
        raise RecipeError(
            "--stream holds one block at a time, and finding the sparsity for this size needs the whole model: say "
            "--sparsity, or a number of parameters with --allocator uniform"
        )
    waits = dtype_named(scratch_dtype, "--scratch-dtype") if scratch_dtype else None
    return streaming(size.recipe, source, scratch, waits, statistics_dtype)
