"""Models side by side: size, quality, speed."""

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data import read_documents
from ..evaluation import check_tokenizers
from ..evaluation import evaluate as evaluate_model
from ..journal import Journal, own_journal
from ..loading import Source, bytes_on_disk, find_dense, find_model, load_model, load_tokenizer
from ..progress import Progress, named, silent
from ..quantizing import check_formats, quantized_rows
from ..speed import prefill_speed
from ..suite.passages import calibration_overlap, scored_texts
from .evaluating import evaluation_facts


def compare(
    models: Sequence[str | Path],
    text: str | Path | None = None,
    *,
    length: int = 1024,
    max_tokens: int | None = None,
    quantized: Sequence[str] = (),
    speed: bool = True,
    progress: Progress = silent,
    until: contextlib.ExitStack | None = None,
    **access: Any,
) -> list[dict[str, Any]]:
    """One row per model, the first being the dense one that the others are compared with.

    Interrupted before `until` is closed, and begun again, it does not measure quality again that was measured before.

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
    if text is not None:
        read_documents(text)
    for source in others if tokenizer is not None else []:
        check_tokenizers(load_tokenizer(source), tokenizer)
    sizes: dict[str, Any] = {"length": length, "max_tokens": max_tokens}
    dense, begun, rows = load_model(sources[0]), time.monotonic(), list[dict[str, Any]]()
    with contextlib.ExitStack() as here:

        def journal(source: Source, against: Source | None, **more: Any) -> Journal:
            assert text is not None
            facts = {**evaluation_facts(source, against, text, sizes), **more}
            kept = own_journal(facts, command="compare", spent=time.monotonic() - begun)
            return (until or here).enter_context(kept)

        for source in sources:
            model = dense if source is sources[0] else load_model(source)
            row: dict[str, Any] = {
                "model": source.name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "bytes": bytes_on_disk(source),
            }
            if tokenizer is not None and text is not None:
                kept = journal(source, None if model is dense else sources[0])
                options: dict[str, Any] = {"journal": kept, "progress": named(progress, source.name), **sizes}
                against = None if model is dense else dense
                row["evaluation"] = evaluate_model(model, tokenizer, text, against=against, **options).to_dict()
                read = scored_texts(model, tokenizer, Path(text), **sizes)
                row["evaluation"]["facts"]["overlap"] = calibration_overlap(source, read)
            if formats:
                options = {"journals": partial(journal, source, None), "progress": progress, **sizes}
                row["quantized"] = quantized_rows(model, tokenizer, text, formats, **options)
            rows.append(row)
            if speed and model is not dense:
                before, after = prefill_speed([dense, model])
                row |= {"tokens_per_second": after, "speedup": after / before}
                rows[0] |= {"tokens_per_second": before, "speedup": 1.0}
    return rows
