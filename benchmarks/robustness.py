"""Robustness and transfer of SmolLM2-135M-Instruct without 20 and 50 % of its blocks: noise, and text of other kinds.

Pruned with C4, and with the topics of Python's language reference (every CPython has them); tested on other documents
of both, and on WikiText-2 raw test, which nothing is calibrated on. Noise is put on the C4 documents.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelm.data import JOIN, read_documents
from prunelm.demo import language_reference
from prunelm.journal import Journal
from prunelm.loading import Source, find_model, load_model, load_tokenizer
from prunelm.overlap import overlap
from prunelm.progress import silent
from prunelm.recipe import Recipe
from prunelm.suite import Setting, Subject
from prunelm.suite.noise import noise
from prunelm.suite.passages import windows_read
from prunelm.suite.texts import score_text

from .quality import C4, WIKITEXT, c4_part, dequantized, pruned_by, written
from .record import device, measure, needed

RECIPES = ("best", "goa")
SPARSITIES = (0.2, 0.5)
HOME = "C4"
"""The text that noise is put on."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is read: sequences and tokens of the calibration, tokens of a window and of a text."""

    samples: int = 64
    calibration_length: int = 512
    length: int = 1024
    max_tokens: int = 20_480
    noisy_tokens: int = 10_240


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The dense model, the documents to calibrate on, and the files to test on."""

    folder: Path
    source: Source
    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    documents: dict[str, list[str]]
    tested: dict[str, Path]
    sizes: Sizes


def main() -> None:
    """Every cell that is not measured yet."""
    if not needed(C4, WIKITEXT):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = dequantized(Path(scratch) / "dense")
        documents, tested = texts(Path(scratch))
        run(folder, documents, {**tested, "WikiText-2": WIKITEXT})


def texts(scratch: Path) -> tuple[dict[str, list[str]], dict[str, Path]]:
    """What is calibrated on, and files of what is tested on, by domain."""
    reference, other = language_reference()
    tested = {
        HOME: written(scratch / "c4.jsonl", c4_part(90, 95)),
        "Python reference": written(scratch / "python-reference.jsonl", [other]),
    }
    return {HOME: c4_part(0, 90), "Python reference": [reference]}, tested


def run(
    folder: Path,
    documents: dict[str, list[str]],
    tested: dict[str, Path],
    *,
    sizes: Sizes | None = None,
    name: str = "robustness",
) -> None:
    """A cell per recipe, size and calibration text."""
    source = find_model(folder, device=device())
    setup = Setup(
        folder=folder,
        source=source,
        dense=load_model(source),
        tokenizer=load_tokenizer(source),
        documents=documents,
        tested=tested,
        sizes=sizes or Sizes(),
    )
    for recipe in RECIPES:
        for sparsity in SPARSITIES:
            for calibrated in documents:
                cell = f"{recipe} {sparsity} {calibrated}"
                measure(name, cell, lambda r=recipe, s=sparsity, c=calibrated: _cell(setup, r, s, c))


def _cell(setup: Setup, recipe: str, sparsity: float, calibrated: str) -> dict[str, Any]:
    """A pruned model on every text; on noise too where it was calibrated at home."""
    sizes = setup.sizes
    chosen = Recipe.load(recipe, sparsity=sparsity, samples=sizes.samples, length=sizes.calibration_length)
    pruned, _, entry = pruned_by(chosen, setup.folder, setup.documents[calibrated])
    ngrams = entry["calibration"]["criterion"]["ngrams"]
    tested = {name: _tested(setup, pruned, text, ngrams) for name, text in setup.tested.items()}
    found = {**entry, "device": device(), "tested": tested}
    if calibrated == HOME:
        found["noise"] = noise(*_subject(setup, pruned, setup.tested[HOME], sizes.noisy_tokens), Journal(), silent)
    return found


def _subject(setup: Setup, pruned: PreTrainedModel, text: Path, max_tokens: int) -> tuple[Subject, Setting]:
    subject = Subject(
        model=pruned,
        dense=setup.dense,
        tokenizer=setup.tokenizer,
        text=text,
        source=setup.source,
        against=setup.source,
    )
    return subject, Setting(length=setup.sizes.length, max_tokens=max_tokens, batch_size=1)


def _tested(setup: Setup, pruned: PreTrainedModel, text: Path, ngrams: dict[str, Any]) -> dict[str, Any]:
    subject, setting = _subject(setup, pruned, text, setup.sizes.max_tokens)
    words = JOIN.join(read_documents(text))
    one = score_text(subject, words, setting, Journal(), silent, text.stem, text.name)
    return {**one.found, "overlap": overlap(windows_read(subject, setting), ngrams)}
