"""The quality of a model on a text."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..data import read_documents
from ..evaluation import Evaluation, check_tokenizers
from ..evaluation import evaluate as evaluate_model
from ..journal import own_journal
from ..loading import Source, find_dense, find_model, load_model, load_tokenizer
from ..progress import Progress, silent
from ..results import versions
from ..suite.passages import calibration_overlap, scored_texts


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    length: int = 1024,
    max_tokens: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    until: ExitStack | None = None,
    **access: Any,
) -> Evaluation:
    """The quality of a model on a text, alone or against its dense parent; see `prunelm.evaluation.evaluate`.

    `facts["overlap"]` says how much of the text the model was calibrated on, where its pruning.json knows. Interrupted
    before `until` is closed, it goes on window by window when it is asked for again.
    """
    read_documents(text)
    source = find_model(model, **access)
    other = find_dense(against, source, **access) if against is not None else None
    tokenizer = load_tokenizer(source)
    if other is not None:
        check_tokenizers(tokenizer, load_tokenizer(other))
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens, "seed": seed}
    with ExitStack() as here:
        facts = evaluation_facts(source, other, text, sizes)
        journal = (until or here).enter_context(own_journal(facts, command="evaluate"))
        loaded = load_model(source)
        dense = load_model(other) if other is not None else None
        found = evaluate_model(loaded, tokenizer, text, against=dense, journal=journal, progress=progress, **sizes)
        read = scored_texts(loaded, tokenizer, Path(text), length=length, max_tokens=max_tokens)
        return replace(found, facts={**found.facts, "overlap": calibration_overlap(source, read)})


def evaluation_facts(
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
