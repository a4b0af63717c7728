"""One calibration, five sizes: what a family of nested models costs beside one size, and how good its models are.

SmolLM2-135M-Instruct, calibrated and evaluated as the larger table of `quality`. The family is pruned by the command
that users have, without the steps of natural gradient; these are then taken from each of its folders, so that one
pruning shows what they are worth. The 20 and 50 % models also answer zero-shot tasks where lm-eval is installed.
Recipes without steps are pruned to the same sizes, to be compared with.
"""

import functools
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelm.data import Batches
from prunelm.loading import find_model, load_model, load_tokenizer
from prunelm.natural_gradient import Aim, aim_of, natural_steps_
from prunelm.reading import reading
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.stream import BlockStream
from prunelm.workflow.several_sizes import prune_sizes
from prunelm.workflow.texts import calibration_batches

from .quality import C4, EVALUATED, SAMPLES, WIKITEXT, c4_part, dense_and_texts, evaluated, facts_of, written
from .record import DATA, measure, needed, shared_folder
from .stages import Stages, plain_pass
from .zero_shot import SPARSITIES, accuracies, installed

RECIPES = ("best", "best-uniform")
OTHERS = (
    "wanda-sp",
    "taylor-first",
    "taylor-second",
    "flap",
    "goa-budget",
    "sensitivity",
    "liar",
    "aef",
    "hywia",
    "osp",
    "osp-repaired",
)
"""Recipes that take no steps."""
SIZES = (0.1, 0.2, 0.3, 0.4, 0.5)


def main() -> None:
    """Every recipe as one family; the folders stay where processes that measure together share one."""
    if not needed(C4, WIKITEXT):
        return
    with tempfile.TemporaryDirectory() as scratch:
        dense, texts = dense_and_texts(Path(scratch))
        documents = written(Path(scratch) / "c4-to-calibrate.jsonl", c4_part(0, 90))
        for name in (*RECIPES, *OTHERS):
            out = (shared_folder() or Path(scratch)) / f"family-{name}"
            measure("families", name, lambda n=name, o=out: _pruned(dense, o, n, documents))
            for size in SIZES:
                measure("families", f"{name} {size}", lambda s=size, o=out: _evaluated(o / f"{s:g}", texts))
                if name in RECIPES:
                    measure(
                        "families",
                        f"{name} {size} stepped",
                        lambda n=name, s=size, o=out: _stepped(dense, o, n, s, texts),
                    )


def _pruned(dense: Path, out: Path, name: str, documents: Path) -> dict[str, Any]:
    """What pruning to all sizes took, stage by stage, and what became of each."""
    recipe = _recipe(name, SIZES[0], natural_steps=0)
    spent = {"plain pass": _plain_pass(dense, recipe)} if name in RECIPES else {}
    start, stages = time.perf_counter(), Stages()
    reports = prune_sizes(dense, out, SIZES, recipe=recipe, text=documents, progress=stages)
    stages.end()
    sizes = {f"{report.recipe.sparsity:g}": facts_of(report) for report in reports.values()}
    return {
        "recipe": recipe.to_dict(),
        "seconds": time.perf_counter() - start,
        "processor_seconds": {**spent, **stages.seconds},
        "sizes": sizes,
    }


def _plain_pass(dense: Path, recipe: Recipe) -> float:
    """Processor seconds of one pass over what a recipe calibrates on, which its cost is told in."""
    model, _, calibration = _read(dense, recipe)
    return plain_pass(model, calibration)


def _recipe(name: str, size: float, **changes: Any) -> Recipe:
    return Recipe.load(name, sparsity=size, samples=SAMPLES, length=512, **changes)


def _read(folder: Path, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Batches]:
    """A model, its tokenizer, and what the recipe calibrates it on."""
    model, tokenizer = _opened(folder)
    return model, tokenizer, calibration_batches(model, tokenizer, recipe, c4_part(0, 90), name="benchmark text")[0]


def _opened(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source = find_model(folder, device="cpu")
    tokenizer = load_tokenizer(source)
    assert tokenizer is not None
    return load_model(source), tokenizer


def _evaluated(folder: Path, texts: Mapping[str, Path]) -> dict[str, Any]:
    """A member of the family as it was pruned."""
    return {"evaluation": evaluated(*_opened(folder), texts, **EVALUATED)}


@functools.cache
def _aimed(dense: Path, name: str) -> tuple[Aim, PreTrainedTokenizerBase]:
    """What the steps of all sizes aim at, which pruning knows from its look at the dense model."""
    recipe = _recipe(name, SIZES[0])
    model, tokenizer, calibration = _read(dense, recipe)
    read = reading(calibration, None, recipe, find_sites(model))
    return aim_of(BlockStream(model, read.batches), read, recipe.natural_steps), tokenizer


def _stepped(dense: Path, family: Path, name: str, size: float, texts: Mapping[str, Path]) -> dict[str, Any]:
    """A member of the family after the recipe's steps of natural gradient, as pruning it ends; zero-shot tasks too."""
    aim, tokenizer = _aimed(dense, name)
    start = time.process_time()
    pruned, _ = _opened(family / f"{size:g}")
    notes = natural_steps_(pruned, aim.on(BlockStream(pruned, aim.fit.stream.batches)))
    seconds = time.process_time() - start
    found: dict[str, Any] = {"notes": notes, "steps": aim.asked, "processor_seconds": seconds}
    found["evaluation"] = evaluated(pruned, tokenizer, texts, **EVALUATED)
    if size in SPARSITIES and installed() and needed(DATA / "tasks"):
        found["tasks"] = accuracies(pruned, tokenizer)
    return found
