"""Zero-shot accuracy through lm-eval: the dense model and the best recipes at 20 and 50 %.

Needs `pip install lm-eval==0.4.13` beside the development requirements, and tasks that do not come with PruneLM.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunelm.recipe import Recipe

from .quality import C4, c4_part, dequantized, pruned_by
from .record import DATA, measure, needed

TASKS = {
    "local_piqa_val": "acc_norm,none",
    "local_arc_easy_test": "acc_norm,none",
    "local_sciq_val": "acc_norm,none",
    "local_hellaswag1k": "acc_norm,none",
    "local_lambada_openai_test": "acc,none",
}
"""Task names and the metric that counts."""
ROWS = 1_000
"""The first rows of each task, or all where there are fewer."""
BATCH = 32
RECIPES = ("best", "obs", "goa-budget")
SPARSITIES = (0.2, 0.5)


def main() -> None:
    """Every cell that is not measured yet."""
    if not needed(C4, DATA / "tasks") or not installed():
        return
    documents = c4_part(0, 90)
    with tempfile.TemporaryDirectory() as scratch:
        dense = dequantized(Path(scratch) / "dense")
        measure("zero-shot", "dense", lambda: _cell(dense, None, []))
        for sparsity in SPARSITIES:
            for name in RECIPES:
                recipe = Recipe.load(name, sparsity=sparsity, samples=128, length=512)
                measure("zero-shot", f"{name} {sparsity}", lambda r=recipe: _cell(dense, r, documents))


def installed() -> bool:
    found = importlib.util.find_spec("lm_eval") is not None
    if not found:
        print("skipped: lm-eval is not installed; pip install lm-eval==0.4.13")
    return found


def _cell(folder: Path, recipe: Recipe | None, documents: list[str]) -> dict[str, Any]:
    """Accuracies, and their standard errors, of the model or of what a recipe makes of it."""
    model, tokenizer, entry = pruned_by(recipe, folder, documents)
    assert tokenizer is not None
    return {**entry, "rows": ROWS, "tasks": accuracies(model, tokenizer, ROWS)}


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int = ROWS
) -> dict[str, dict[str, float]]:
    """`value` and `error` of every task, on its first rows."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.environ["HF_HUB_OFFLINE"] = "1"
    here = Path.cwd()
    os.chdir(Path(__file__).parents[1])  # the tasks name their files from the project's root
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, device=str(model.device)),
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(DATA / "tasks")),
            limit=rows,
            bootstrap_iters=100,
        )
    finally:
        os.chdir(here)
    return {
        task: {
            "value": found["results"][task][metric],
            "error": found["results"][task][metric.replace(",", "_stderr,")],
        }
        for task, metric in TASKS.items()
    }
