"""Calibrate on one text, test on another: the matrix that says how much a pruned model hangs on its calibration."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
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
from .progress import Progress, named, silent
from .pruning import prune_
from .recipe import Recipe
from .results import versions, write_results
from .suite.quality import perplexities, windows_scored
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
    is written but `out`, cell by cell; cells that it has of the same texts are not measured again. An interrupted cell
    goes on from a journal beside it, with the same numbers; its model is pruned anew.

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
    for a, text in known.items():
        missing = [b for b, other in known.items() if _cell(found, _asked(text, other)) is None]
        if not missing:
            continue
        pruned, ngrams = _pruned(source, tokenizer, recipe, text.calibrated, a, progress)
        test = functools.partial(_tested, pruned, dense, tokenizer, seed=recipe.seed, progress=progress)
        for b in missing:
            asked = _asked(text, known[b])
            journal = _journal(target, {**head, **asked, "threads": torch.get_num_threads()})
            cell = test(windows[b], f"{a} on {b}", journal)
            met = overlap(_scored(windows[b], tokenizer), ngrams) if ngrams else None
            found["cells"].append({**asked, **cell, "overlap": met})
            if target is not None:
                write_results(target, found)
            if journal.path is not None:
                journal.path.unlink()
    return found


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


def _journal(target: Path | None, facts: Mapping[str, Any]) -> Journal:
    """The journal of a cell, beside the file."""
    if target is None:
        return Journal()
    return Journal(target.with_name(f".{target.name}.{digest_of(facts)[:8]}.journal"), facts)


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
