"""What a model is for, read off its class."""

from transformers import PreTrainedModel


def task_of(model: PreTrainedModel) -> str:
    """What a model is asked and evaluated by: `causal`, `masked`, `classifier` or `embedding`."""
    name = type(model).__name__
    for ending, task in (("ForSequenceClassification", "classifier"), ("ForMaskedLM", "masked")):
        if name.endswith(ending):
            return task
    return "causal" if model.can_generate() else "embedding"
