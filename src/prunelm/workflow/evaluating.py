"""The quality of a model on a text."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..data import read_documents, text_files
from ..errors import EvaluationError
from ..evaluation import Evaluation, Score, check_tokenizers
from ..evaluation import evaluate as evaluate_model
from ..heap import large_returned
from ..journal import own_journal
from ..loading import Source, find_dense, find_model, load_model, load_tokenizer, skeleton
from ..progress import Progress, silent
from ..results import versions
from ..shelf import Shelf, check_plain
from ..streamed_scores import StreamedScores
from ..suite.passages import calibration_overlap, scored_texts
from ..tasks import task_of


def evaluate(
    model: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    length: int = 1024,
    max_tokens: int | None = None,
    seed: int = 0,
    stream: bool = False,
    progress: Progress = silent,
    until: ExitStack | None = None,
    **access: Any,
) -> Evaluation:
    """The quality of a model on a text, alone or against its dense parent; see `prunelm.evaluation.evaluate`.

    `facts["overlap"]` says how much of the text the model was calibrated on, where its pruning.json knows. Interrupted
    before `until` is closed, it goes on window by window when it is asked for again. With `stream`, only one block of a
    causal model is in memory at a time; the numbers are the same.

    Raises:
        EvaluationError: the models cannot be compared, or with `stream` are not causal; losses are not finite.
        RecipeError: with `stream`, weights are quantized or in a .gguf file.
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
        if stream:
            loaded, dense, sizes["score"] = _streamed(source, other, progress, here)
        else:
            loaded, dense = load_model(source), load_model(other) if other is not None else None
        found = evaluate_model(loaded, tokenizer, text, against=dense, journal=journal, progress=progress, **sizes)
        read = scored_texts(loaded, tokenizer, Path(text), length=length, max_tokens=max_tokens)
        return replace(found, facts={**found.facts, "overlap": calibration_overlap(source, read)})


def _streamed(
    source: Source, other: Source | None, progress: Progress, here: ExitStack
) -> tuple[PreTrainedModel, PreTrainedModel | None, Score]:
    """One model or two of which one block is in memory at a time until `here` is closed, and what scores windows so."""
    sources = [source] if other is None else [source, other]
    shapes = []
    for one in sources:
        check_plain(one)
        shapes.append(skeleton(one, buffers=True))
        if task_of(shapes[-1]) != "causal":
            raise EvaluationError(f"--stream measures causal models, and {one.name} is none: leave it out")
    here.enter_context(large_returned())
    shelf, *rest = [
        here.enter_context(Shelf(one, model=model).running()) for one, model in zip(sources, shapes, strict=True)
    ]
    dense = rest[0] if rest else None
    return shelf.model, dense.model if dense is not None else None, StreamedScores(shelf, dense, progress).score


def evaluation_facts(
    source: Source, other: Source | None, text: str | Path, sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """What tells one evaluation from another; files by size and time, which costs no reading."""
    facts: dict[str, Any] = {"text": _stamps(text_files(Path(text))), **sizes, "versions": versions()}
    for who, one in (("model", source), ("against", other)):
        facts[who] = None if one is None else [str(one.device), _stamps(_files_of(one))]
    return {**facts, "threads": torch.get_num_threads()}


def _files_of(source: Source) -> list[Path]:
    """The files of a model."""
    if source.gguf is not None:
        return [source.folder / source.gguf]
    return sorted(p for p in source.folder.iterdir() if p.is_file())


def _stamps(files: Sequence[Path]) -> dict[str, list[int]]:
    """Size and time of files, by path."""
    return {str(p.resolve()): [p.stat().st_size, p.stat().st_mtime_ns] for p in files}
