"""The three sibling methods beside their own ingredients: OSP, AEF / HyWIA, and LIAR.

SmolLM2-135M-Instruct on C4, evaluated as in `quality`; MiniLM-SST2 on unlabeled training sentences.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from prunelm.journal import Journal
from prunelm.recipe import Recipe

from .quality import C4, WIKITEXT, c4_part, cells_of, dequantized, written
from .record import DATA, measure, needed

CRITERIA = ("l2", "snip", "wanda-sp", "second-moment", "fused", "obs")
REPAIRS = ("none", "bias", "least-squares")
FUSED = {
    "coarse alone": {"fusion": "fixed", "alpha": 1.0},
    "fine alone": {"fusion": "fixed", "alpha": 0.0},
    "aef (reliability)": {"fusion": "reliability"},
    "hywia (attention)": {"fusion": "attention"},
    "searched": {"fusion": "searched"},
}
OSP = {
    "osp, its start": ("osp", 0),
    "osp": ("osp", None),
    "osp-repaired": ("osp-repaired", None),
}


def main() -> None:
    """Every cell that is not measured yet."""
    if needed(C4, WIKITEXT):
        _decoder()
    if needed(DATA / "models" / "minilm-sst2", DATA / "tasks" / "sst2_train.jsonl"):
        _encoder()


def _decoder() -> None:
    documents, options = c4_part(0, 90), {"length": 1024, "max_tokens": 10_240}
    with tempfile.TemporaryDirectory() as scratch:
        dense = dequantized(Path(scratch) / "dense")
        texts = {"WikiText-2": WIKITEXT, "C4": written(Path(scratch) / "c4-held-out.jsonl", c4_part(90, 95))}

        def cell(name: str, recipe: Recipe | None, journal: Path | None = None) -> None:
            kept = lambda: None if journal is None else Journal(journal)  # noqa: E731
            measure("siblings", name, lambda: cells_of(dense, recipe, documents, texts, journal=kept(), **options))

        cell("dense", None)
        for name, recipe in _osp():
            # The search of `osp-repaired` is that of `osp`, step by step: the second reads it from the first's journal.
            cell(name, recipe, Path(scratch) / "osp.jsonl" if name.startswith("osp") and "start" not in name else None)
        for sparsity in (0.2, 0.5):
            for name, fusion in FUSED.items():
                scoring = {"criterion": "fused", **fusion}
                cell(f"{name} {sparsity}", Recipe.load("aef", sparsity=sparsity, attention=scoring, ffn=scoring))


def _osp() -> list[tuple[str, Recipe]]:
    """The search, its start, and the search repaired, at 30 %."""
    found = []
    for name, (recipe, steps) in OSP.items():
        chosen = Recipe.load(recipe, sparsity=0.3)
        if steps is not None:
            policy = {**chosen.to_dict()["policy"], "steps": steps}
            chosen = Recipe.load(recipe, sparsity=0.3, policy=policy)
        found.append((name, chosen))
    return found


def _encoder() -> None:
    """Criterion by repair on MiniLM-SST2: FFN channels and heads, half of the encoder's parameters."""
    model, tasks = DATA / "models" / "minilm-sst2", DATA / "tasks"
    lines = (tasks / "sst2_train.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = [json.loads(line)["sentence"] for line in lines]
    texts = {"SST-2 test": tasks / "sst2_test.jsonl"}
    measure("siblings", "minilm dense", lambda: cells_of(model, None, [], texts))
    for criterion in CRITERIA:
        for repair in REPAIRS:
            recipe = Recipe.load("obs", sparsity=0.5, criterion=criterion, reconstruction=repair, **_SMALL)
            measure("siblings", f"minilm {criterion} {repair}", lambda r=recipe: cells_of(model, r, sentences, texts))
    for name in ("obs", "liar"):
        for hidden in (0.0, 0.125, 0.25):
            sizes = {"sparsity": 0.5, "hidden": hidden, "per_block": True, "samples": 800, "length": 128}
            recipe = Recipe.load(name, **sizes)
            measure(
                "siblings", f"minilm {name} hidden {hidden:g}", lambda r=recipe: cells_of(model, r, sentences, texts)
            )


_SMALL: dict[str, Any] = {
    "samples": 400,
    "length": 64,
    "multiple_of": 1,
    "per_block": True,
    "allocator": "per-module",
}
