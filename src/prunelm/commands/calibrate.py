"""`prunelm calibrate`."""

import json
import shlex
from typing import Annotated

import typer

from ..workflow import DEFAULT_RECIPE
from .asked import given, resumed
from .console import err, exactly, out, progress_bars, quiet, tell
from .options import (
    Access,
    ComputeDtype,
    Deterministic,
    Device,
    Force,
    JournalFile,
    MaybeFolder,
    MaybeModel,
    MaybeSeed,
    Multiple,
    RecipeName,
    Resume,
    SampleLength,
    Samples,
    Text,
)


def calibrate(
    model: MaybeModel = None,
    out_folder: MaybeFolder = None,
    resume: Resume = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    sparsity: Annotated[float, typer.Option(help="Sparsity for which a recipe that searches looks for a plan.")] = 0.3,
    text: Text = None,
    journal: JournalFile = None,
    samples: Samples = None,
    length: SampleLength = None,
    multiple_of: Multiple = None,
    seed: MaybeSeed = None,
    device: Device = None,
    compute_dtype: ComputeDtype = "float32",
    deterministic: Deterministic = False,
    force: Force = False,
    *,
    access: Access,
) -> None:
    """Look at MODEL once, and save what later runs of prune need, at any sparsity."""
    from ..recipe import Recipe
    from ..workflow.calibrating import calibrate as run

    if resume is not None:
        resumed(resume, "calibrate", model)
        return
    model, out_folder = given(MODEL=model, OUT=out_folder)
    chosen = Recipe.load(recipe, sparsity=sparsity, samples=samples, length=length, multiple_of=multiple_of, seed=seed)
    err.print(f"recipe: {json.dumps(chosen.to_dict())}")
    with quiet(), progress_bars() as progress, exactly(deterministic):
        found = run(
            model,
            out_folder,
            recipe=chosen,
            text=text,
            journal=journal,
            device=device,
            compute_dtype=compute_dtype,
            force=force,
            progress=progress,
            **vars(access),
        )
    tell(found.notes)
    out.print(f"{out_folder}: what was seen of {len(found.survey.scores)} sites. Use it, at this sparsity or another:")
    words = [model, "OUT", "--sparsity", f"{sparsity:g}", "--calibrated", out_folder]
    if text is not None and chosen.reads_pruned:
        words += ["--text", text]
    if compute_dtype != "float32":
        words += ["--compute-dtype", compute_dtype]
    words += access.words
    out.print(f"prunelm prune {shlex.join(map(str, words))}")
