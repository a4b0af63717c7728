"""Pruned and quantized against quantized only: the same weights rounded to a format, and what that costs in bytes."""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .errors import BudgetError
from .evaluation import evaluate
from .journal import Journal
from .progress import Progress, named
from .registry import did_you_mean
from .sites import find_sites
from .storage import PLAIN, format_named, stored_after, stored_bytes, type_of


def rounded_to(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A copy of the model whose weights have the values that they have in a file of a format."""
    copied = copy.deepcopy(model)
    tensors = {tensor.name: tensor for tensor in stored_after(copied, find_sites(copied), {})}
    turning = {f"{path}.weight" for path, module in copied.named_modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for path, parameter in copied.named_parameters():
            if not parameter.numel():
                continue
            tensor, turned = tensors[path], path in turning
            array = (parameter.T if turned else parameter).detach().float().cpu().contiguous().numpy()
            kind = type_of(tensor, name)
            found = torch.from_numpy(gguf.dequantize(gguf.quantize(array, kind), kind).reshape(array.shape).copy())
            parameter.copy_(found.T if turned else found)
    return copied


def check_formats(names: Sequence[str]) -> list[str]:
    """The formats that a user means, as far as values can be rounded to them here.

    Raises:
        BudgetError: there is none of that name, or it cannot be made here.
    """
    found = [format_named(name) for name in names]
    for name in found:
        if name not in PLAIN:
            raise BudgetError(
                f"values cannot be rounded to {name!r} here. {did_you_mean(name, PLAIN)}Known: {', '.join(PLAIN)}."
            )
    return found


def quantized_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    formats: Sequence[str],
    *,
    length: int,
    max_tokens: int | None,
    journals: Callable[..., Journal],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Bytes of a model's weights in each format and, where a text is given, quality with its weights rounded to it.

    `journals` gives one for each `format`.
    """
    tensors = stored_after(model, find_sites(model), {})
    rows = []
    for name in formats:
        row: dict[str, Any] = {"format": name, "bytes": stored_bytes(tensors, name)}
        if tokenizer is not None and text is not None:
            found = evaluate(
                rounded_to(model, name),
                tokenizer,
                text,
                length=length,
                max_tokens=max_tokens,
                journal=journals(format=name),
                progress=named(progress, name),
            )
            row |= {"metric": found.metric, "value": found.value, "error": found.error}
        rows.append(row)
    return rows


def at_equal_bytes(dense: Sequence[dict[str, Any]], other: dict[str, Any]) -> float | None:
    """The lowest perplexity that the dense model has in at most as many bytes; None where every format takes more.

    Between two neighboring formats its logarithm is on straight lines over log bytes.
    """
    points = sorted((row["bytes"], row["value"]) for row in dense)
    found = [value for size, value in points if size <= other["bytes"]]
    for (less, small), (more, large) in pairwise(points):
        if less <= other["bytes"] <= more:
            share = math.log(other["bytes"] / less) / math.log(more / less) if more > less else 0.0
            found.append(math.exp((1 - share) * math.log(small) + share * math.log(large)))
    return min(found, default=None)
