"""Quality of every recipe at several sizes, on text that chose no recipe and no setting.

SmolLM2-135M-Instruct: calibrated on C4 documents (the last 5 % of the file left out: they decided the defaults),
evaluated on WikiText-2 raw test, and in the larger table also on C4 documents between 90 and 95 % of the file, which
none of its cells is calibrated on.
MiniLM-SST2: calibrated on unlabeled training sentences, evaluated on the test file.
tiny-gpt2: calibrated on C4 up to 90 % of the file, evaluated on the documents between 90 and 95 %.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelm.data import Batches
from prunelm.demo import model_file
from prunelm.depth import block_influence, drop_blocks_
from prunelm.errors import BudgetError
from prunelm.evaluation import evaluate
from prunelm.family import prune_family
from prunelm.job import plan_counts
from prunelm.journal import Journal
from prunelm.loading import find_model, load_model, load_tokenizer
from prunelm.pruning import Report, prune_
from prunelm.recipe import Recipe
from prunelm.workflow.texts import calibration_batches

from .record import DATA, device, measure, needed, one_at_a_time, shared_folder
from .stages import Stages, plain_pass

C4 = DATA / "text" / "c4_calibration.jsonl"
WIKITEXT = DATA / "text" / "wikitext2_raw_test.txt"
RECIPES = ("random", "l1", "l2", "wanda-sp", "goa", "goa-data-free", "goa-budget")
SPARSITIES = (0.1, 0.2, 0.3)
SHORTGPT = "shortgpt (whole blocks)"
FRONTIER = (
    "best",
    "best-uniform",
    "obs",
    "wanda-sp",
    "flap",
    "goa-budget",
    "taylor-first",
    "taylor-second",
    "sensitivity",
    "liar",
    "osp-repaired",
    "osp",
    "aef",
    "hywia",
    SHORTGPT,
)
FRONTIER_SPARSITIES = (0.3, 0.5, 0.2, 0.1, 0.4)
SAMPLES = 128
EVALUATED = {"length": 1024, "max_tokens": 20_480}
"""Windows that every table of SmolLM2 is evaluated on."""
SWEEP = ("best", "goa")
SWEEP_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SWEEP_SAMPLES = 16


def c4_part(start: int, stop: int) -> list[str]:
    """The documents of the C4 file between two percentages."""
    texts = [json.loads(line)["text"] for line in C4.read_text(encoding="utf-8").splitlines()]
    return texts[len(texts) * start // 100 : len(texts) * stop // 100]


def frontier() -> None:
    """Recipes with and without repair from 10 to 50 %, one calibration set, two texts; the middle sizes first."""
    if not needed(C4, WIKITEXT):
        return
    documents = c4_part(0, 90)
    with tempfile.TemporaryDirectory() as scratch:
        dense, texts = dense_and_texts(Path(scratch))
        measure("frontier", "dense", lambda: cells_of(dense, None, [], texts, **EVALUATED))
        for sparsity in FRONTIER_SPARSITIES:
            for name in FRONTIER:
                sizes: dict[str, Any] = {"sparsity": sparsity, "samples": SAMPLES, "length": 512}
                run, calibrated_as = (_shorter, "obs") if name == SHORTGPT else (cells_of, name)
                recipe = Recipe.load(calibrated_as, **sizes)
                measure(
                    "frontier",
                    f"{name} {sparsity}",
                    lambda r=recipe, run=run: run(dense, r, documents, texts, **EVALUATED),
                )


def sweep() -> None:
    """Two recipes from 10 to 90 %, to see where quality breaks down: one as a family, the other size by size."""
    if not needed(C4, WIKITEXT):
        return
    documents = c4_part(0, 90)
    with tempfile.TemporaryDirectory() as scratch:
        dense, texts = dense_and_texts(Path(scratch))
        measure("sweep", "dense", lambda: cells_of(dense, None, [], texts, **EVALUATED))
        for name in SWEEP:
            recipe = Recipe.load(name, sparsity=SWEEP_SPARSITIES[0], samples=SWEEP_SAMPLES, length=512)
            measure("sweep", name, lambda r=recipe: _sizes_of(dense, r, documents, texts, **EVALUATED))


def dense_and_texts(scratch: Path) -> tuple[Path, dict[str, Path]]:
    """SmolLM2's folder, and the two texts that the larger tables evaluate on."""
    c4 = written(scratch / "c4-held-out.jsonl", c4_part(90, 95))
    return dequantized(scratch / "dense"), {"WikiText-2": WIKITEXT, "C4": c4}


def _sizes_of(
    folder: Path, recipe: Recipe, documents: list[str], texts: dict[str, Path], **options: Any
) -> dict[str, Any]:
    """The evaluations of every size that can be met; nested ones from one look where widths are searched."""
    source = find_model(folder, device=device())
    tokenizer, dense = load_tokenizer(source), load_model(source)
    calibration, refit = calibration_batches(dense, tokenizer, recipe, documents, name="benchmark text")
    shares = [sparsity for sparsity in SWEEP_SPARSITIES if _can_go(dense, recipe, sparsity)]
    found: dict[str, Any] = dict.fromkeys(map(str, SWEEP_SPARSITIES))
    start = time.perf_counter()
    if recipe.judges_plans:
        family = prune_family(lambda: load_model(source), calibration, recipe, shares, refit=refit)
    else:
        family = (_alone(load_model(source), calibration, replace(recipe, sparsity=s), refit) for s in shares)
    for share, (pruned, _) in zip(shares, family, strict=True):
        found[str(share)] = evaluated(pruned, tokenizer, texts, **options)
    seconds = time.perf_counter() - start
    return {"recipe": recipe.to_dict(), "calibration": calibration.facts, "seconds": seconds, "sizes": found}


def evaluated(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: dict[str, Path], **options: Any
) -> dict[str, Any]:
    return {name: evaluate(model, tokenizer, text, **options).to_dict() for name, text in texts.items()}


def _alone(
    dense: PreTrainedModel, calibration: Batches, recipe: Recipe, refit: Batches | None
) -> tuple[PreTrainedModel, Report]:
    return dense, prune_(dense, calibration, recipe, refit=refit)


def _can_go(dense: PreTrainedModel, recipe: Recipe, sparsity: float) -> bool:
    try:
        plan_counts(dense, replace(recipe, sparsity=sparsity))
    except BudgetError:
        return False
    return True


def written(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents), encoding="utf-8")
    return path


def smollm2() -> None:
    """The main table: 10, 20 and 30 % of block parameters."""
    if not needed(C4, WIKITEXT):
        return
    documents = c4_part(0, 95)
    with tempfile.TemporaryDirectory() as scratch:
        dense = dequantized(Path(scratch) / "dense")
        measure("smollm2", "dense", lambda: _cell(dense, None, [], WIKITEXT, **EVALUATED))
        for name in reversed(RECIPES):
            for sparsity in SPARSITIES:
                sizes = {} if name == "goa-data-free" else {"samples": 64, "length": 512}
                recipe = Recipe.load(name, sparsity=sparsity, multiple_of=1, **sizes)
                measure(
                    "smollm2",
                    f"{name} {sparsity}",
                    lambda r=recipe: _cell(dense, r, documents, WIKITEXT, **EVALUATED),
                )


def dequantized(folder: Path) -> Path:
    """SmolLM2 as a float32 folder, which opens much faster than its GGUF file and computes the same.

    Processes that measure together share one.
    """
    folder = (shared_folder() or folder.parent) / folder.name
    with one_at_a_time():
        if not (folder / "config.json").is_file():
            _dequantize(folder)
    return folder


def _dequantize(folder: Path) -> None:
    source = find_model(model_file(), device="cpu")
    load_model(source).save_pretrained(folder)
    load_tokenizer(source).save_pretrained(folder)


def encoder() -> None:
    """MiniLM-SST2 at 20 and 50 % of encoder parameters, FFN channels only (stock) and with heads (per block)."""
    model, train, test = DATA / "models" / "minilm-sst2", DATA / "tasks" / "sst2_train.jsonl", DATA / "tasks"
    test = test / "sst2_test.jsonl"
    if not needed(model, train, test):
        return
    sentences = [json.loads(line)["sentence"] for line in train.read_text(encoding="utf-8").splitlines()]
    measure("minilm-sst2", "dense", lambda: _cell(model, None, [], test))
    for sparsity in (0.2, 0.5):
        for name, extra in _small_cases():
            recipe = Recipe.load(name, sparsity=sparsity, samples=400, length=64, multiple_of=1, **extra)
            label = f"{name}{' heads too' if extra else ''} {sparsity}"
            measure("minilm-sst2", label, lambda r=recipe: _cell(model, r, sentences, test))


def tiny_gpt2() -> None:
    """tiny-gpt2 at 20 and 50 % of block parameters."""
    model = DATA / "models" / "tiny-gpt2"
    if not needed(model, C4):
        return
    documents = c4_part(0, 90)
    with tempfile.TemporaryDirectory() as scratch:
        held = written(Path(scratch) / "c4-held-out.jsonl", c4_part(90, 95))
        measure("tiny-gpt2", "dense", lambda: _cell(model, None, [], held, length=256))
        for sparsity in (0.2, 0.5):
            for name, extra in _small_cases():
                recipe = Recipe.load(name, sparsity=sparsity, samples=128, length=256, multiple_of=1, **extra)
                label = f"{name}{' heads too' if extra else ''} {sparsity}"
                measure("tiny-gpt2", label, lambda r=recipe: _cell(model, r, documents, held, length=256))


def _small_cases() -> list[tuple[str, dict[str, Any]]]:
    heads_too = {"per_block": True, "allocator": "per-module"}
    return [
        ("random", {}),
        ("wanda-sp", {}),
        ("goa-budget", {}),
        ("goa-budget", heads_too),
    ]


def _shorter(
    model: Path, recipe: Recipe, documents: list[str], texts: dict[str, Path], **options: Any
) -> dict[str, Any]:
    """Drop the blocks of least influence, as many as the recipe's sparsity is of all, and evaluate on some texts."""
    source = find_model(model, device=device())
    tokenizer, pruned = load_tokenizer(source), load_model(source)
    calibration, _ = calibration_batches(pruned, tokenizer, recipe, documents, name="benchmark text")
    start, before = time.perf_counter(), pruned.num_parameters()
    influence = block_influence(pruned, calibration.batches)
    gone = sorted(influence.argsort()[: round(recipe.sparsity * len(influence))].tolist())
    drop_blocks_(pruned, gone)
    return {
        "dropped": gone,
        "parameters": pruned.num_parameters(),
        "removed": before - pruned.num_parameters(),
        "seconds": time.perf_counter() - start,
        "calibration": calibration.facts,
        "evaluation": evaluated(pruned, tokenizer, texts, **options),
    }


def _cell(model: Path, recipe: Recipe | None, documents: list[str], text: Path, **options: Any) -> dict[str, Any]:
    """Prune in memory and evaluate on one text."""
    found = cells_of(model, recipe, documents, {"": text}, **options)
    return {**found, "evaluation": found["evaluation"][""]}


def cells_of(
    model: Path,
    recipe: Recipe | None,
    documents: list[str],
    texts: dict[str, Path],
    *,
    journal: Journal | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Prune in memory and evaluate on some texts."""
    pruned, tokenizer, entry = pruned_by(recipe, model, documents, journal=journal)
    return {
        **entry,
        "evaluation": evaluated(pruned, tokenizer, texts, **options),
    }


def pruned_by(
    recipe: Recipe | None,
    model: Path,
    documents: list[str],
    *,
    journal: Journal | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, dict[str, Any]]:
    """The model as a recipe leaves it (as it is, without one), its tokenizer, and what is recorded of the pruning."""
    source = find_model(model, device=device())
    tokenizer, pruned = load_tokenizer(source), load_model(source)
    if recipe is None:
        return pruned, tokenizer, {"parameters": pruned.num_parameters()}
    read = documents if recipe.calibration == "text" else None
    calibration, refit = calibration_batches(pruned, tokenizer, recipe, read, name="benchmark text")
    one_pass, stages = plain_pass(pruned, calibration) if recipe.judges_plans else None, Stages()
    report = prune_(pruned, calibration, recipe, refit=refit, journal=journal, progress=stages)
    stages.end()
    entry = {
        "recipe": recipe.to_dict(),
        "seconds": report.seconds,
        "processor_seconds": {"plain pass": one_pass, **stages.seconds},
        **facts_of(report),
    }
    return pruned, tokenizer, entry


def facts_of(report: Report) -> dict[str, Any]:
    """What is recorded of a pruned model."""
    return {
        "parameters": report.parameters_after,
        "share_of_blocks": report.sparsity_of_blocks,
        "calibration": report.calibration,
        "kept": {key: site["kept"] for key, site in report.sites.items()},
        "notes": report.notes,
    }
