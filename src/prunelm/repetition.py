"""How much of a calibration text says the same again: what is read twice determines nothing new."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .stream import Batch

PASSAGE = 16
"""Tokens in a passage; ordinary text hardly ever says so many again."""
LITTLE = 0.5
"""A smaller share of passages that differ is told."""


def passages(batches: Sequence[Batch]) -> dict[str, int]:
    """How many runs of 16 tokens some batches hold, and how many of them differ; shorter sequences count as one."""
    factors = torch.randint(2**62, (PASSAGE,), generator=torch.Generator().manual_seed(0))
    sums = [torch.zeros(0, dtype=torch.int64)]
    for row in _rows(batches):
        whole = nn.functional.pad(row, (0, max(0, PASSAGE - len(row))), value=-1)
        sums.append((whole.unfold(0, PASSAGE, 1) * factors).sum(1))
    found = torch.cat(sums)
    return {"passages": len(found), "distinct_passages": len(set(found.tolist()))}


def distinct_beginnings(batches: Sequence[Batch]) -> int:
    """How many tokens of some batches end a different beginning of a sequence; a causal model tells no more apart."""
    rows = sorted(row.tolist() for row in _rows(batches))
    found, last = 0, list[int]()
    for row in rows:
        shared = next((n for n, (a, b) in enumerate(zip(row, last, strict=False)) if a != b), min(len(row), len(last)))
        found, last = found + len(row) - shared, row
    return found


def repetition_notes(facts: Mapping[str, Any]) -> list[str]:
    """What to tell of a calibration text that mostly repeats itself, by its facts; nothing of other texts."""
    read, different = facts.get("passages", 0), facts.get("distinct_passages", 0)
    if different >= LITTLE * read:
        return []
    return [
        f"the calibration text repeats itself: of {read:,} passages of {PASSAGE} tokens only {different:,} differ, so "
        "scores and repairs rest on little, and held-out sequences cannot judge them. Give text that does not repeat."
    ]


def _rows(batches: Sequence[Batch]) -> list[torch.Tensor]:
    """The token ids of every sequence, padding apart."""
    rows = []
    for batch in batches:
        ids = batch["input_ids"].cpu()
        mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
        rows += [row[real] for row, real in zip(ids, mask, strict=True)]
    return rows
