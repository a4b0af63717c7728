"""Calibrate on one text, test on another: the matrix that says how much a pruned model hangs on its calibration."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import fingerprint, tokenizer_fingerprint
from .data import JOIN, prefix_ids, read_documents
from .differing import differences, digest_of, in_words
from .errors import DataError, EvaluationError
from .evaluation import text_windows, window_bytes
from .journal import Journal
from .loading import Source, find_model, load_model, load_tokenizer, read_json
from .overlap import overlap
from .own_work import workbench_until
from .progress import Progress, named, silent
from .pruning import prune_
from .recipe import Recipe
from .results import versions, write_results
from .suite.quality import perplexities, windows_scored
from .tasks import task_of
from .workbench import Step, Workbench
from .workflow.texts import calibration_batches, check_reads
from .writing import check_target, writes

FORMAT = 1
KIND = "transfer"
_SHORT = 16
"""Digits of a checksum that tell texts and cells of one run apart."""


@writes
def transfer(
    model: str | Path,
    texts: Sequence[str | Path],
    *,
    recipe: Recipe,
    length: int = 1024,
    max_tokens: int | None = None,
    out: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
    until: ExitStack | None = None,
    **access: Any,
) -> dict[str, Any]:
    """The quality of a model pruned with each text's first part, on each text's other part, beside the dense model.

    A text of several documents is split into those of even and of odd place, a single document in its middle. Nothing
    is written but `out`, cell by cell; cells that it has of the same texts are not measured again. An interrupted run,
    without `out` one before `until` is closed, goes on when it is asked for again, with the same numbers.

    Args:
        model: dense, and causal.
        texts: at least two, with names that differ.
        recipe: how to prune.
        length: tokens in an evaluation window.
        max_tokens: of each tested part.
        out: file to write or to add to.
        force: drop unfinished work on `out` of other texts or another recipe; what `out` has stays.
        progress: told about blocks and windows.
        until: see `prunelm.evaluate`.
        access: see `prunelm.prune`.

    Raises:
        PruneLMError: one line that says what to do; finished cells stay in `out`.
        ResumeError: `out` has the unfinished work of another run; says what differs.
    """
    check_reads(recipe, "texts")
    known = _read(texts)
    source = find_model(model, **access)
    target = Path(out) if out is not None else None
    named = {"name": Path(source.name).resolve().name, **fingerprint(source)}
    named["tokenizer"] = tokenizer_fingerprint(source)
    head = {"format": FORMAT, "kind": KIND, "model": named, "recipe": recipe.to_dict()}
    head |= {"length": length, "max_tokens": max_tokens, "versions": versions()}
    found = _opened(target, head)
    found["cells"] = [cell for cell in found["cells"] if _stands(cell, known)]
    tokenizer, dense = load_tokenizer(source), load_model(source)
    if task_of(dense) != "causal":
        raise EvaluationError(f"{source.name}: only models that predict the next token can be compared on other texts")
    windows = {
        b: text_windows(text.tested, f"{b}, tested part", dense, tokenizer, length, max_tokens)
        for b, text in known.items()
    }
    task = {**head, "texts": {name: text.sha256 for name, text in known.items()}, "device": source.where}
    with workbench_until(until, target, task, command="transfer", force=force) as bench:
        for a, text in known.items():
            asked = {b: _asked(text, other) for b, other in known.items()}
            found["cells"] += _kept(bench, [one for one in asked.values() if _cell(found, one) is None])
            missing = {b: one for b, one in asked.items() if _cell(found, one) is None}
            if not missing:
                continue
            part = bench.part(text.sha256[:_SHORT])
            pruned, ngrams = _pruned(source, tokenizer, recipe, text.calibrated, a, part, progress)
            test = functools.partial(_tested, pruned, dense, tokenizer, seed=recipe.seed, progress=progress)
            for b, one in missing.items():
                cell = test(windows[b], f"{a} on {b}", part.journal(f"on-{known[b].sha256[:_SHORT]}"))
                met = overlap(_scored(windows[b], tokenizer), ngrams) if ngrams else None
                found["cells"].append({**one, **cell, "overlap": met})
                if target is None:
                    bench.put(_place(one), Step(facts=found["cells"][-1]))
                else:
                    write_results(target, found)
            bench.drop(text.sha256[:_SHORT])
    return found


def _kept(bench: Workbench, asked: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those cells that an earlier run has finished, where it wrote no file."""
    steps = [bench.get(_place(one)) for one in asked]
    return [step.facts for step in steps if step is not None]


def _place(asked: Mapping[str, Any]) -> str:
    """The name of a cell on the bench."""
    return f"cell-{digest_of(asked)[:_SHORT]}"


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text: its name, what it is calibrated on, what it is tested on, and the checksum of all of it."""

    name: str
    calibrated: list[str]
    tested: str
    sha256: str


def _read(texts: Sequence[str | Path]) -> dict[str, _Text]:
    """The texts by name.

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
            one, other = documents[::2], JOIN.join(documents[1::2])
        else:
            middle = len(documents[0]) // 2
            one, other = [documents[0][:middle]], documents[0][middle:]
        digest = hashlib.sha256(JOIN.join(documents).encode()).hexdigest()
        found[name] = _Text(name=name, calibrated=one, tested=other, sha256=digest)
    return found


def _asked(one: _Text, other: _Text) -> dict[str, Any]:
    """Which cell is meant: the names and the checksums of its texts."""
    digests = {"calibrated": one.sha256, "tested": other.sha256}
    return {"calibrated": one.name, "tested": other.name, "sha256": digests}


def _cell(found: Mapping[str, Any], asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The cell of these very texts."""
    return next((c for c in found["cells"] if all(c.get(name) == value for name, value in asked.items())), None)


def _stands(cell: Mapping[str, Any], known: Mapping[str, _Text]) -> bool:
    """Whether a cell is of these texts, as far as it is of texts of these names."""
    digests = cell.get("sha256", {})
    ends = [end for end in ("calibrated", "tested") if cell[end] in known]
    return all(digests.get(end) == known[cell[end]].sha256 for end in ends)


def _scored(windows: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of some windows, one after the other."""
    skipped = len(prefix_ids(tokenizer))
    return str(tokenizer.decode(torch.cat([window[skipped:] for window in windows]).tolist()))


def _pruned(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    documents: Sequence[str],
    name: str,
    bench: Workbench,
    progress: Progress,
) -> tuple[PreTrainedModel, Mapping[str, Any] | None]:
    model = load_model(source)
    batches, refit = calibration_batches(model, tokenizer, recipe, documents, name=name)
    prune_(model, batches, recipe, refit=refit, bench=bench, progress=named(progress, f"with {name}"))
    return model, batches.facts.get("ngrams")


def _tested(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Tensor],
    stage: str,
    journal: Journal,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    records = windows_scored(model, dense, windows, journal=journal, progress=progress, stage=stage, where=stage)
    found = perplexities(records, sum(window_bytes(window, tokenizer) for window in windows), seed)
    return {name: value for name, value in found.items() if name != "windows"}


def _opened(target: Path | None, head: Mapping[str, Any]) -> dict[str, Any]:
    """What the file has so far.

    Raises:
        EvaluationError: it is of another model, tokenizer, recipe or length; says what differs.
    """
    if target is None or not target.exists():
        if target is not None:
            check_target(target)
        return {**head, "cells": []}
    there = read_json(target)
    differ = differences({name: there.get(name) for name in head}, json.loads(json.dumps(head)))
    if differ:
        raise EvaluationError(f"{target}: of another run: {in_words(differ)}. Name another file, or remove it.")
    return there
