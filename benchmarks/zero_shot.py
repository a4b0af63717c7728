"""Zero-shot accuracy through lm-eval: the dense model and the best recipes at 20 and 50 %.

Needs `pip install lm-eval==0.4.13` beside the development requirements, and tasks that do not come with PruneLM.
"""

import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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


ROOT = Path(__file__).parents[1]
"""The project's root, from which the tasks name their files."""


def installed() -> bool:
    """Whether lm-eval is there, and the rows of the tasks are where they are looked for."""
    if importlib.util.find_spec("lm_eval") is None:
        print("skipped: lm-eval is not installed; pip install lm-eval==0.4.13")
        return False
    if not (ROOT / "../shared/data/tasks").is_dir():
        print("skipped: the tasks name their files in ../shared/data/tasks, which is not beside this project")
        return False
    return True


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
    from lm_eval.tasks import TaskManager

    os.environ["HF_HUB_OFFLINE"] = "1"
    here = Path.cwd()
    os.chdir(ROOT)
    try:
        found = lm_eval.simple_evaluate(
            model=reader(model, tokenizer),
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


def reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model as lm-eval asks it, but for one thing: what stands before several answers is read once for all."""
    from lm_eval.models.huggingface import HFLM

    class Reader(HFLM):
        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], *_args: Any, **_known: Any
        ) -> list[tuple[float, bool]]:
            alike: dict[tuple[int, ...], list[int]] = {}
            for place, (_, context, _) in enumerate(requests):
                alike.setdefault(tuple(context), []).append(place)
            found: dict[int, tuple[float, bool]] = {}
            for context, places in alike.items():
                found.update(zip(places, answered(model, context, [requests[p][2] for p in places]), strict=True))
            return [found[place] for place in range(len(requests))]

    return Reader(pretrained=model, tokenizer=tokenizer, device=str(model.device))


@torch.no_grad()
def answered(
    model: PreTrainedModel, context: Sequence[int], answers: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """(log probability, whether each token is the likeliest) of every answer behind the same context."""
    place, longest = model.device, max(map(len, answers))
    if len(context) + longest > model.config.max_position_embeddings:
        raise ValueError(f"{len(context)} tokens of context and {longest} of an answer are more than the model reads")
    before = model(torch.tensor([list(context)], device=place), use_cache=True, logits_to_keep=1)
    logits = before.logits.expand(len(answers), -1, -1)
    if longest > 1:
        cache = before.past_key_values
        cache.batch_repeat_interleave(len(answers))
        padded = [[*answer[:-1], *[0] * (longest - len(answer))] for answer in answers]
        behind = model(torch.tensor(padded, device=place), past_key_values=cache, use_cache=True)
        logits = torch.cat([logits, behind.logits], dim=1)
    found = []
    for rows, answer in zip(logits.float().log_softmax(-1), answers, strict=True):
        tokens = torch.tensor(answer, device=place)
        rows = rows[: len(answer)]
        found.append((float(rows.gather(1, tokens[:, None]).sum()), bool((rows.argmax(-1) == tokens).all())))
    return found
