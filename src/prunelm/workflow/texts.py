"""Calibration text: read from a file or written by the model, as the batches that a recipe asks for."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Batches, read_documents, read_labeled, sample_batches
from ..errors import DataError
from ..generate import random_tokens, self_generated
from ..loading import Source, load_tokenizer
from ..memory import batch_tokens_on
from ..recipe import Recipe
from ..reconstructions import RECONSTRUCTIONS
from ..repetition import distinct_beginnings
from ..sites import find_sites, weight_of
from ..tasks import task_of
from ..workbench import Step, Workbench


def check_reads(recipe: Recipe, given: str = "--text") -> None:
    """Raise if the model writes its calibration text itself, and some is given, by that name.

    Raises:
        DataError: says so.
    """
    if recipe.calibration == "self-generated":
        raise DataError(f"{given} and self-generated calibration exclude each other: this recipe writes its own text")


def read_text(text: str | Path, recipe: Recipe) -> tuple[list[str], list[int] | None]:
    """The documents of a text, with their labels where the recipe's loss reads some."""
    if recipe.loss != "task":
        return read_documents(text), None
    rows = read_labeled(text)
    return [document for document, _ in rows], [label for _, label in rows]


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one calibration from another, without the n-grams, which follow from it."""
    return {name: value for name, value in facts.items() if name != "ngrams"}


def read_batches(
    model: PreTrainedModel, source: Source, recipe: Recipe, text: str | Path | None
) -> tuple[Batches, Batches | None]:
    """What `calibration_batches` gives, from a text file or by the model itself.

    Raises:
        DataError: the text cannot be read, or is too short.
    """
    documents, labels = read_text(text, recipe) if text is not None else (None, None)
    name = Path(text).name if text is not None else None
    return calibration_batches(model, load_tokenizer(source), recipe, documents, labels=labels, name=name)


def calibration_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    documents: Sequence[str] | None,
    *,
    labels: Sequence[int] | None = None,
    name: str | None = None,
    batch_tokens: int | None = None,
    bench: Workbench | None = None,
    otherwise: str = "",
) -> tuple[Batches, Batches | None]:
    """The batches that criteria read, and those that the reconstruction reads where they are others; beside the model.

    What the model wrote itself is kept on the bench. `otherwise` ends the sentence that asks for more text.

    Raises:
        DataError: too little text for one window, or for as many tokens as the refit solves for channels.
    """
    if tokenizer is None or not recipe.reads_text:
        return Batches(batches=[], facts={"tokens": 0, "sequences": 0, "source": "none needed"}), None
    sizes = {"samples": recipe.samples, "length": recipe.length, "seed": recipe.seed}
    if documents is None:
        found = _kept_text(bench or Workbench(), lambda: self_generated(model, tokenizer, **sizes))
    else:
        causal = task_of(model) == "causal"
        at_once = batch_tokens or batch_tokens_on(model.device)
        found = sample_batches(
            documents, tokenizer, model.config, causal=causal, labels=labels, batch_tokens=at_once, **sizes
        )
        found.facts["source"] = name or "text"
    refit = random_tokens(model, tokenizer, **sizes) if recipe.covariance_text == "random-tokens" else None
    if RECONSTRUCTIONS[recipe.reconstruction].solves:
        _check_rank(model, refit or found, recipe, otherwise)
    return found.to(model.device), refit.to(model.device) if refit is not None else None


def _kept_text(bench: Workbench, make: Callable[[], Batches]) -> Batches:
    """Token batches that an earlier run made, or else new ones."""
    step = bench.get("text")
    if step is None:
        made = make()
        bench.put("text", Step(facts=made.facts, tensors={f"{n}": b["input_ids"] for n, b in enumerate(made.batches)}))
        return made
    return Batches(batches=[{"input_ids": step.tensors[f"{n}"]} for n in range(len(step.tensors))], facts=step.facts)


def _check_rank(model: PreTrainedModel, found: Batches, recipe: Recipe, otherwise: str) -> None:
    widest = max(weight_of(site.consumer.layer).shape[1] for site in find_sites(model, recipe.unit))
    if recipe.hidden:
        widest = max(widest, int(model.config.hidden_size))
    fitted = int(found.tokens * (1 - recipe.held_out))
    different = distinct_beginnings(found.batches) if task_of(model) == "causal" else found.tokens
    if different < widest <= fitted:
        raise DataError(
            f"the calibration text repeats itself: of {found.tokens:,} tokens only {different:,} come after different "
            f"text, and they cannot determine a refit of {widest:,} channels. Give text that does not "
            f"repeat{otherwise}."
        )
    if fitted < widest:
        raise DataError(
            f"{fitted:,} calibration tokens cannot determine a refit of {widest:,} channels: at least "
            f"{widest:,} tokens are needed, {4 * widest:,} are better. Give more text, more --samples or "
            f"--length{otherwise}."
        )
