"""Part `widths`: whether a layer is slower than a wider one would be, because its width does not suit the machine."""

import functools
import statistics
from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

from ..journal import Journal
from ..placement import device_words
from ..progress import Progress
from ..sites import Site, find_sites, weight_of
from ..speed import product_seconds
from . import Setting, Subject
from .timing import spread

ROUNDER = (8, 16, 32, 64, 128)
"""Widths that matrix kernels like are multiples of these."""
READ = 512
"""Tokens that are read at once; one when a text is written."""

Shapes = list[tuple[int, int]]


def widths(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Seconds of the matrix products of every width that lost channels, and how those of wider layers compare.

    `reading` 512 tokens and `writing` one; the widths take turns. Under `wider` the next multiples of 8 to 128, at most
    the dense width, each with the ratio of its time to that of the width that the model has: below 1, the wider layer
    is faster. Values are medians of `rounds`; ratios have quartiles.
    """
    found, asked = [], _asked(subject)
    for i, (site, width, most, blocks) in enumerate(asked):
        progress("timing widths", i, len(asked))
        shapes = {w: _shapes(site, w) for w in (width, *_wider(width, most))}
        row: dict[str, Any] = {"site": site.name, "width": width, "dense": most, "blocks": blocks}
        row["wider"] = [{"width": w} for w in shapes if w != width]
        for name, rows in (("reading", READ), ("writing", 1)):
            run = functools.partial(_turns, subject.model, shapes, rows, setting.rounds)
            times = journal.entry(run)
            row[name] = statistics.median(times[str(width)])
            for other in row["wider"]:
                pairs = zip(times[str(other["width"])], times[str(width)], strict=True)
                other[name] = spread([theirs / ours for theirs, ours in pairs])
        found.append(row)
    progress("timing widths", len(asked), len(asked))
    processor = device_words(subject.model.device)
    return {"widths": found, "rounds": setting.rounds, "threads": torch.get_num_threads(), "processor": processor}


def _asked(subject: Subject) -> list[tuple[Site, int, int, int]]:
    """A site of every kind and width that is made of channels and lost some, with its dense width and its blocks."""
    plan = subject.source.plan()
    sites = [site for site in find_sites(subject.model) if site.n_units and site.consumer.index.shape[1] == 1]
    dense = {key: one["units"] for key, one in plan["sites"].items()} if plan is not None else {}
    if subject.dense is not None:
        dense = {site.key: site.n_units for site in find_sites(subject.dense)}
    counts = Counter((site.name, site.n_units) for site in sites)
    first = {(site.name, site.n_units): site for site in reversed(sites)}
    found = [
        (site, width, dense[site.key], counts[name, width])
        for (name, width), site in first.items()
        if width < dense.get(site.key, 0)
    ]
    return sorted(found, key=lambda row: (row[0].name, row[1]))


def _wider(width: int, most: int) -> list[int]:
    """The next multiples, at most the dense width."""
    return sorted({rounded for m in ROUNDER if width < (rounded := -(-width // m) * m) <= most})


def _shapes(site: Site, width: int) -> Shapes:
    """(inputs, outputs) of the site's layers, were it of this width."""
    readers = [(weight_of(slot.layer).shape[1], width * slot.index.shape[1]) for slot in site.producers]
    return [*readers, (width, weight_of(site.consumer.layer).shape[0])]


def _turns(model: PreTrainedModel, shapes: dict[int, Shapes], rows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per width and round, after one round of warm-up."""
    times: dict[str, list[float]] = {str(width): [] for width in shapes}
    for turn in range(rounds + 1):
        for width, mine in shapes.items():
            seconds = product_seconds(mine, rows, device=model.device, dtype=model.dtype)
            if turn:
                times[str(width)].append(seconds)
    return times
