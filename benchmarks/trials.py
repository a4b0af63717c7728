"""What was tried for the recipe `best`, on text that no other benchmark evaluates on.

SmolLM2-135M-Instruct, calibrated on the same C4 documents as the other tables. What decides is the mean loss above
dense on three kinds of text: C4 documents of the last 5 % of the file, Wikipedia passages, and the second half of
sequences that say their first half twice. WikiText-2 decides nothing.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelm.data import JOIN
from prunelm.recipe import Recipe

from .quality import C4, c4_part, dequantized, pruned_by
from .record import DATA, measure, needed, read

PASSAGES = DATA / "tasks" / "boolq_val.jsonl"
WINDOWS, LENGTH = 20, 1024
TRIALS: dict[str, dict[str, Any]] = {
    "obs, equal widths": {"recipe": "obs"},
    "4,096 tokens": {"price_tokens": 4096},
    "16,384 tokens": {"price_tokens": 16_384},
    "repeated 0.5, 16,384 tokens": {"repeated": 0.5, "price_tokens": 16_384},
    "ffn alone": {"sites": ["ffn"], "price_tokens": 4096},
    "ffn alone, repeated 0.5": {"sites": ["ffn"], "repeated": 0.5, "price_tokens": 4096},
    "ffn alone, 16,384 tokens": {"sites": ["ffn"], "price_tokens": 16_384},
    "ffn alone, repeated 0.5, 16,384 tokens": {"sites": ["ffn"], "repeated": 0.5, "price_tokens": 16_384},
    "ffn alone, exchanges 32": {"sites": ["ffn"], "exchanges": 32, "price_tokens": 4096},
    "ffn alone, ridge 1": {"sites": ["ffn"], "ridge": 1.0, "price_tokens": 4096},
    "equal widths searched": {"recipe": "best-uniform", "price_tokens": 4096},
    "equal widths searched, repeated 0.5, 16,384 tokens": {
        "recipe": "best-uniform",
        "repeated": 0.5,
        "price_tokens": 16_384,
    },
}
"""What each trial changes in `best`, or in the recipe it names, where `repeated` is 0 unless it says otherwise."""
FIRST, SECOND = 0.3, 0.5
"""All trials run at the first sparsity, the best of them at the second too."""
FINALISTS = 4


def main() -> None:
    """Every trial at the first size, then the best ones at the second."""
    if not needed(C4, PASSAGES):
        return
    with tempfile.TemporaryDirectory() as scratch:
        dense = dequantized(Path(scratch) / "dense")
        measure("trials", "dense", lambda: _cell(dense, None))
        for name in TRIALS:
            measure("trials", f"{name} {FIRST}", lambda n=name: _cell(dense, recipe_of(n, FIRST)))
        for name in ranked(FIRST)[:FINALISTS]:
            measure("trials", f"{name} {SECOND}", lambda n=name: _cell(dense, recipe_of(n, SECOND)))


def recipe_of(trial: str, sparsity: float) -> Recipe:
    """The recipe of a trial."""
    changes = {"repeated": 0.0, **TRIALS[trial]}
    return Recipe.load(changes.pop("recipe", "best"), sparsity=sparsity, samples=128, length=512, **changes)


def ranked(sparsity: float) -> list[str]:
    """The trials measured at a size, least mean excess first."""
    entries = read("trials")
    known = [name for name in TRIALS if f"{name} {sparsity}" in entries]
    return sorted(known, key=lambda name: mean_excess(entries, f"{name} {sparsity}"))


def mean_excess(entries: dict[str, Any], cell: str) -> float:
    """Loss above dense, the mean over the kinds of text."""
    dense, found = entries["dense"]["losses"], entries[cell]["losses"]
    return sum(found[text] - dense[text] for text in dense) / len(dense)


def _cell(folder: Path, recipe: Recipe | None) -> dict[str, Any]:
    model, tokenizer, entry = pruned_by(recipe, folder, c4_part(0, 90) if recipe else [])
    assert tokenizer is not None
    groups = sum(count for key, count in entry.pop("kept", {}).items() if key.endswith("attention"))
    return {**entry, "groups": groups, "losses": losses(model, tokenizer)}


def losses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Nats per token on the three kinds of text that decide."""
    c4 = _windows(tokenizer, c4_part(95, 100))
    lines = PASSAGES.read_text(encoding="utf-8").splitlines()[:400]
    passages = _windows(tokenizer, [json.loads(line)["query"].partition("\nQuestion:")[0] for line in lines])
    half = LENGTH // 2
    return {
        "C4": _loss(model, c4, 1),
        "Wikipedia passages": _loss(model, passages, 1),
        "said again": _loss(model, c4[:, :half].repeat(1, 2), half),
    }


def _windows(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Int[Tensor, "window token"]:
    ids: Tensor = tokenizer(JOIN.join(texts), return_tensors="pt")["input_ids"][0]
    count = min(WINDOWS, len(ids) // LENGTH)
    return ids[: count * LENGTH].view(count, LENGTH)


@torch.no_grad()
def _loss(model: PreTrainedModel, windows: Int[Tensor, "window token"], start: int) -> float:
    """The mean loss of the tokens from `start` on."""
    total = 0.0
    for row in windows.to(model.device):
        logits = model(row[None]).logits[0, start - 1 : -1].float()
        total += float(cross_entropy(logits, row[start:]))
    return total / len(windows)
