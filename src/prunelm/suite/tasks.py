"""Part `tasks`: lm-eval's own numbers for the model and for the dense one."""

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import EvaluationError
from ..journal import Journal
from ..progress import Progress
from . import Setting, Subject


def tasks(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Every metric of every task with its standard error, as lm-eval names them: `acc`, `acc_norm` and so on.

    Raises:
        EvaluationError: lm-eval is not installed, or knows no such task.
    """
    manager = _manager(setting)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(setting.tasks):
        progress("tasks", i, len(setting.tasks))
        for who, model in subject.models.items():
            run = functools.partial(_measured, model, subject.tokenizer, name, manager, setting)
            for task, metrics in journal.entry(run).items():
                found.setdefault(task, {})[who] = metrics
    progress("tasks", len(setting.tasks), len(setting.tasks))
    return {"tasks": found, "limit": setting.limit, "lm_eval": _version()}


def check_tasks(setting: Setting) -> None:
    """Raise where tasks are asked for that lm-eval does not know.

    Raises:
        EvaluationError: lm-eval is not installed, or knows no such task.
    """
    if setting.tasks:
        _manager(setting)


def _manager(setting: Setting) -> Any:
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("tasks are measured by lm-eval, which is not installed: pip install 'prunelm[eval]'")
    manager = _indexed(setting.include_path)
    unknown = [name for name in setting.tasks if not manager.match_tasks([name])]
    if unknown:
        where = f" (looked in {setting.include_path} too)" if setting.include_path else ""
        raise EvaluationError(
            f"lm-eval knows no task {', '.join(map(repr, unknown))}{where}. `lm-eval ls tasks` lists them; tasks of "
            "your own are found with --include-path DIR."
        )
    return manager


@functools.lru_cache(maxsize=1)
def _indexed(include_path: str | None) -> Any:
    """lm-eval's index of its tasks and of those in a folder, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")


def _measured(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, manager: Any, setting: Setting
) -> dict[str, Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=setting.batch_size, device=str(model.device)),
        tasks=[task],
        task_manager=manager,
        limit=setting.limit,
        random_seed=setting.seed,
        numpy_random_seed=setting.seed,
        torch_random_seed=setting.seed,
        fewshot_random_seed=setting.seed,
    )
    return {name: _metrics(values, found["n-samples"].get(name)) for name, values in found["results"].items()}


def _metrics(values: Mapping[str, Any], counts: Any) -> dict[str, Any]:
    """`acc,none` with `acc_stderr,none` becomes `acc`: value and error."""
    metrics: dict[str, Any] = {}
    for key, value in values.items():
        metric, _, variant = key.partition(",")
        if metric.endswith("_stderr") or not isinstance(value, int | float) or not variant:
            continue
        error = values.get(f"{metric}_stderr,{variant}")
        label = metric if variant == "none" else f"{metric} ({variant})"
        metrics[label] = {"value": value, "error": error if isinstance(error, int | float) else None}
    if counts:
        metrics["rows"] = counts["effective"]
    return metrics
