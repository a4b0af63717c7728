"""What a model is for, read off its class."""

from transformers import PreTrainedModel

_ENDINGS = {
    "ForSequenceClassification": "classifier",
    "ForMaskedLM": "masked",
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForConditionalGeneration": "causal",
}


PIPELINES = {
    "causal": "text-generation",
    "masked": "fill-mask",
    "classifier": "text-classification",
    "embedding": "feature-extraction",
}
"""What the Hugging Face hub calls them."""


def task_named(name: str) -> str:
    """The same by the name of a class alone, as config.json has it."""
    return next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), "embedding")


def task_of(model: PreTrainedModel) -> str:
    """What a model is asked and evaluated by: `causal`, `masked`, `classifier` or `embedding`."""
    name = type(model).__name__
    for ending, task in (("ForSequenceClassification", "classifier"), ("ForMaskedLM", "masked")):
        if name.endswith(ending):
            return task
    return "causal" if model.can_generate() else "embedding"
