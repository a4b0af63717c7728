"""Calibrate on one text, test on another: the matrix that says how much a pruned model hangs on its calibration."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import fingerprint
from .data import JOIN, read_documents
from .errors import DataError, EvaluationError
from .evaluation import check_losses, text_windows, window_bytes
from .loading import Source, find_model, load_model, load_tokenizer, read_json
from .overlap import overlap
from .progress import Progress, named, silent
from .pruning import prune_
from .recipe import Recipe
from .results import write_results
from .scoring import score_windows
from .suite.quality import perplexities
from .tasks import task_of
from .workflow.texts import calibration_batches
from .writing import check_target, writes

FORMAT = 1
KIND = "transfer"


@writes
def transfer(
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    recipe: Recipe,
    length: int = 1024,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    progress: Progress = silent,
    **access: Any,
) -> dict[str, Any]:
    """The quality of a model pruned with each text's first part, on each text's other part, beside the dense model.

    A text of several documents is split into those of even and of odd place, a single document in its middle. Nothing
    is written but `out`, cell by cell; cells that it has are not measured again.

    Args:
        model: dense, and causal.
        texts: at least two, with names that differ.
        recipe: how to prune.
        length: tokens in an evaluation window.
        max_tokens: of each tested part.
        out: file to write or to add to.
        progress: told about blocks and windows.
        access: see `prunelm.prune`.

    Raises:
        PruneLMError: one line that says what to do; finished cells stay in `out`.
    """
    halves = _halves(texts)
    source = find_model(model, **access)
    target = Path(out) if out is not None else None
    named = {"name": Path(source.name).name, **fingerprint(source)}
    head = {"format": FORMAT, "kind": KIND, "model": named, "recipe": recipe.to_dict()}
    head |= {"length": length, "max_tokens": max_tokens}
    found = _opened(target, head)
    tokenizer, dense = load_tokenizer(source), load_model(source)
    if task_of(dense) != "causal":
        raise EvaluationError(f"{source.name}: only models that predict the next token can be compared on other texts")
    windows = {
        name: text_windows(text, f"{name}, tested part", dense, tokenizer, length, max_tokens)
        for name, (_, text) in halves.items()
    }
    for a, (documents, _) in halves.items():
        missing = [b for b in halves if _cell(found, a, b) is None]
        if not missing:
            continue
        pruned, ngrams = _pruned(source, tokenizer, recipe, documents, a, progress)
        for b in missing:
            cell = _tested(pruned, dense, tokenizer, windows[b], f"{a} on {b}", recipe.seed, progress)
            met = overlap(halves[b][1], ngrams) if ngrams else None
            found["cells"].append({"calibrated": a, "tested": b, **cell, "overlap": met})
            if target is not None:
                write_results(target, found)
    return found


def _halves(texts: Sequence[str | Path]) -> dict[str, tuple[list[str], str]]:
    """By name: the documents to calibrate on, and the text to test on.

    Raises:
        DataError: fewer than two texts, or two of one name.
    """
    names = [Path(text).stem for text in texts]
    if len(set(names)) < len(names) or len(names) < 2:
        raise DataError(f"at least two texts with different names are needed, got {', '.join(names) or 'none'}")
    found = {}
    for name, path in zip(names, texts, strict=True):
        documents = read_documents(path)
        if len(documents) > 1:
            found[name] = (documents[::2], JOIN.join(documents[1::2]))
        else:
            middle = len(documents[0]) // 2
            found[name] = ([documents[0][:middle]], documents[0][middle:])
    return found


def _cell(found: Mapping[str, Any], a: str, b: str) -> Mapping[str, Any] | None:
    return next((cell for cell in found["cells"] if (cell["calibrated"], cell["tested"]) == (a, b)), None)


def _pruned(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    documents: Sequence[str],
    name: str,
    progress: Progress,
) -> tuple[PreTrainedModel, Mapping[str, Any] | None]:
    model = load_model(source)
    batches, refit = calibration_batches(model, tokenizer, recipe, documents, name=name)
    prune_(model, batches, recipe, refit=refit, progress=named(progress, f"with {name}"))
    return model, batches.facts.get("ngrams")


def _tested(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Tensor],
    stage: str,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    records = []
    for i, window in enumerate(windows):
        progress(stage, i, len(windows))
        records += score_windows(model, torch.stack([window]), dense)
    progress(stage, len(windows), len(windows))
    check_losses(model, windows, records, stage)
    found = perplexities(records, sum(window_bytes(window, tokenizer) for window in windows), seed)
    return {name: value for name, value in found.items() if name != "windows"}


def _opened(target: Path | None, head: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has so far.

    Raises:
        EvaluationError: it is of another model, recipe or length.
    """
    if target is None or not target.exists():
        if target is not None:
            check_target(target)
        return {**head, "cells": []}
    there = read_json(target)
    differ = sorted(name for name, value in json.loads(json.dumps(head)).items() if there.get(name) != value)
    if differ:
        raise EvaluationError(
            f"{target}: of another run ({', '.join(differ)} differ). Name another file, or remove it."
        )
    return there
