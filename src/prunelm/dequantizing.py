"""Quantized checkpoints as models of plain floats, as far as transformers dequantizes them on any machine."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import PreTrainedModel

from .errors import UnsupportedModelError

METHODS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "fp8": (lambda: transformers.FineGrainedFP8Config(dequantize=True), None),
    "compressed-tensors": (lambda: transformers.CompressedTensorsConfig(dequantize=True), "compressed_tensors"),
}
"""By the name that a config has for it: what makes transformers dequantize it, and the package that this needs."""


def quantization_of(config: Mapping[str, Any], where: str) -> str | None:
    """How a checkpoint is quantized, or None where it is not.

    Raises:
        UnsupportedModelError: in a way that is not dequantized here, or only by a package that is not installed.
    """
    facts = config.get("quantization_config") or config.get("compression_config")
    if not facts:
        return None
    name = str(facts.get("quant_method")) if isinstance(facts, Mapping) else str(facts)
    if name not in METHODS:
        raise UnsupportedModelError(
            f"{where}: its weights are quantized by {name!r}, which is not dequantized here: {', '.join(METHODS)} and "
            "GGUF are. Give the model that it was made from."
        )
    package = METHODS[name][1]
    if package is not None and importlib.util.find_spec(package) is None:
        raise UnsupportedModelError(
            f"{where}: its weights are quantized by {name!r}: pip install {package.replace('_', '-')} to read them."
        )
    return name


def dequantizing(name: str) -> dict[str, Any]:
    """What `from_pretrained` needs to give plain floats."""
    return {"quantization_config": METHODS[name][0]()}


def forget_quantization_(model: PreTrainedModel) -> None:
    """Let a model whose weights are plain floats by now say so; otherwise transformers refuses to save it as such."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    # What was done to the weights when they were read is otherwise undone when they are saved.
    if getattr(model, "_weight_conversions", None) is not None:
        model._weight_conversions = None
