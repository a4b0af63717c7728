"""Part `heads`: which of the dense model's attention heads attend alike, on the evaluation text."""

import functools
from typing import Any

import torch

from ..curves import upper_triangle
from ..data import JOIN, padded_batches, read_documents
from ..encoders import texts_of
from ..evaluation import text_windows
from ..journal import Journal
from ..progress import Progress
from ..similarity import head_similarity
from ..sites import Site, find_sites
from ..stream import Batch, BlockStream
from ..tasks import task_of
from . import Setting, Subject

SEQUENCES, LENGTH, ROWS, SKIP = 8, 512, 64, 8
"""What is looked at: sequences, tokens of each at most, query rows of each, and first rows that are left out."""


def heads(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Per attention site the Jensen-Shannon distances of its heads in nats, row by row right of the diagonal.

    Source: arXiv 2407.19126, Eq. 1. Differs: at most 64 query rows of 8 sequences, the first 8 rows and the first key
    left out.

    Raises:
        DataError: the text does not fill one window.
    """
    assert subject.dense is not None
    sites = [site for site in find_sites(subject.dense) if site.spec.probabilities is not None]
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        stream = BlockStream(subject.dense, _batches(subject, setting))
        at = 0
        for k, site in enumerate(sites):
            progress("comparing heads", k, len(sites))
            while at < site.block:
                stream.advance(at)
                at += 1
            found[site.key] = journal.entry(functools.partial(_compared, stream, site))["distances"]
    progress("comparing heads", len(sites), len(sites))
    return {"similarity": found}


def _compared(stream: BlockStream, site: Site) -> dict[str, Any]:
    sizes: dict[str, Any] = {"sequences": SEQUENCES, "rows": ROWS, "skip": SKIP, "exclude_sink": True}
    return {"distances": upper_triangle(head_similarity(stream, site.block, str(site.spec.probabilities), **sizes))}


def _batches(subject: Subject, setting: Setting) -> list[Batch]:
    assert subject.dense is not None
    model, tokenizer = subject.dense, subject.tokenizer
    if task_of(model) == "causal":
        length = min(setting.length, LENGTH)
        text = JOIN.join(read_documents(subject.text))
        windows = text_windows(text, str(subject.text), model, tokenizer, length, SEQUENCES * length)
        batches: list[Batch] = [{"input_ids": window[None]} for window in windows]
    else:
        length = min(setting.length, LENGTH, model.config.max_position_embeddings)
        texts = texts_of(subject.text, tokenizer, None)[:SEQUENCES]
        batches = padded_batches(texts, tokenizer, length, SEQUENCES)
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
