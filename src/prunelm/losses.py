"""Losses: one number that says how badly a model answers a batch; the lower, the better."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from .data import Batches, Masking
from .errors import DataError, UnsupportedModelError
from .masking import Mask
from .stream import Batch, prediction, real_rows
from .tasks import task_of

LOSSES = ("auto", "next-token", "masked-lm", "task", "kl", "drawn")
MASKED_SHARE = 0.15


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss by name, and the batches that it is asked of, with labels where it needs them."""

    name: str
    batches: list[Batch]
    seed: int = 0

    def __call__(self, model: PreTrainedModel, batch: Batch, dense: Tensor | None = None) -> Tensor:
        """The mean loss of a batch, in nats; `kl` wants what `answers` gave for the dense model."""
        if self.name == "kl":
            assert dense is not None
            return divergence(answers(model, batch), dense, predicts(model))
        if self.name == "drawn":
            generator = torch.Generator().manual_seed(self.seed + int(batch["input_ids"].sum()))
            loss, rows = drawn_loss(model, batch, generator)
            return loss / rows
        found: Tensor = model(**batch, **({"use_cache": False} if self.name == "next-token" else {})).loss
        return found

    def judged(self, model: PreTrainedModel, mask: Mask, put: Callable[[], None]) -> float:
        """The mean loss of all sequences under what `put` puts into an open mask; `kl` is to the whole model."""
        sequences = [len(batch["input_ids"]) for batch in self.batches]
        losses = [self.under(model, mask, batch, [put])[0] for batch in self.batches]
        return sum(n * loss for n, loss in zip(sequences, losses, strict=True)) / sum(sequences)

    def under(
        self, model: PreTrainedModel, mask: Mask, batch: Batch, puts: Iterable[Callable[[], None]]
    ) -> list[float]:
        """The loss of one batch under each of several masks."""
        mask.open()
        dense = answers(model, batch) if self.name == "kl" else None
        found = []
        for put in puts:
            put()
            found.append(float(self(model, batch, dense)))
        return found


def objective(name: str, model: PreTrainedModel, calibration: Batches, *, unlabeled: str, seed: int = 0) -> Objective:
    """A loss with its batches.

    - `next-token`: of causal models;
    - `masked-lm`: of masked models, over a seeded 15 % of the real tokens, all of them replaced by the mask token;
    - `task`: of classifiers, on batches with labels;
    - `kl`: divergence from the dense model's own answers, for any model (see `divergence`); without a gradient at it;
    - `drawn`: -log p(y) of labels that the model draws itself, for any model: its gradient says where it is sharp;
    - `auto`: the first two where they fit, else what `unlabeled` names.

    Raises:
        UnsupportedModelError: the model has no such loss.
        DataError: the batches have no labels, or nothing says what the mask token is.
    """
    task = task_of(model)
    chosen = {"causal": "next-token", "masked": "masked-lm"}.get(task, unlabeled) if name == "auto" else name
    _check_fits(chosen, task, model)
    plain = [without_labels(batch) for batch in calibration.batches]
    if chosen == "next-token":
        return Objective(name=chosen, batches=[_shifted(batch) for batch in plain])
    if chosen == "masked-lm":
        return Objective(name=chosen, batches=masked(plain, calibration.masking, seed))
    if chosen == "task":
        if not all("labels" in batch for batch in calibration.batches):
            raise DataError(
                "loss 'task' needs labels, and the calibration text has none: give a .jsonl file whose lines have a "
                "field 'label', or use loss 'kl'"
            )
        return Objective(name=chosen, batches=list(calibration.batches))
    return Objective(name=chosen, batches=plain, seed=seed)


def _check_fits(name: str, task: str, model: PreTrainedModel) -> None:
    wanted = {
        "next-token": ("causal", "predicts no next token"),
        "masked-lm": ("masked", "predicts no masked token"),
        "task": ("classifier", "is no classifier"),
    }
    if name in wanted and wanted[name][0] != task:
        raise UnsupportedModelError(
            f"{type(model).__name__} {wanted[name][1]}, which loss {name!r} needs. Use loss 'auto', or a criterion "
            "that reads no gradients."
        )


def without_labels(batch: Batch) -> Batch:
    """A batch as a model reads it."""
    return {name: value for name, value in batch.items() if name != "labels"}


def next_token_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean next-token loss of a batch, in nats; padding does not count.

    Raises:
        UnsupportedModelError: the model predicts no next token.
    """
    _check_fits("next-token", task_of(model), model)
    return Objective(name="next-token", batches=[])(model, _shifted(batch))


def _shifted(batch: Batch) -> Batch:
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(~batch["attention_mask"].bool(), -100)
    return {**batch, "labels": labels}


def masked(batches: Sequence[Batch], masking: Masking | None, seed: int) -> list[Batch]:
    """Batches with some of their tokens hidden behind the mask token, and these tokens as labels.

    At least one token of a sequence is hidden where any may be; special tokens and padding never are.

    Raises:
        DataError: nothing says what the mask token is.
    """
    if masking is None:
        raise DataError("loss 'masked-lm' needs a mask token, and the tokenizer has none: use loss 'kl'")
    generator, found = torch.Generator().manual_seed(seed), list[Batch]()
    special = torch.tensor(sorted(masking.special))
    for batch in batches:
        ids = batch["input_ids"]
        free = ~torch.isin(ids, special.to(ids.device))
        if "attention_mask" in batch:
            free &= batch["attention_mask"].bool()
        draw = torch.rand(ids.shape, generator=generator).to(ids.device).masked_fill(~free, 2.0)
        hidden = free & ((draw < MASKED_SHARE) | (draw == draw.min(-1, keepdim=True).values))
        labels = ids.masked_fill(~hidden, -100)
        found.append({**batch, "input_ids": ids.masked_fill(hidden, masking.token), "labels": labels})
    return found


def predicts(model: PreTrainedModel) -> bool:
    """Whether the model's output are logits."""
    return model.get_output_embeddings() is not None or hasattr(model, "classifier") or task_of(model) == "classifier"


def answers(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "row _"]:
    """Log-probabilities, or the last hidden states of a model without a head; one row a token (a sequence's class)."""
    read = without_labels(batch)
    output = real_rows(prediction(model(**read)), read.get("attention_mask")).float()
    return output.log_softmax(-1) if predicts(model) else output


def divergence(now: Float[Tensor, "row _"], dense: Float[Tensor, "row _"], predicted: bool) -> Tensor:
    """KL(dense || now) per row in nats; of hidden states, their squared distance relative to the dense ones."""
    if predicted:
        return kl_div(now, dense, log_target=True, reduction="sum") / len(now)
    return (now - dense).square().sum() / dense.square().sum()


def drawn_loss(model: PreTrainedModel, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]:
    """Sum of -log p(y) over the rows of a batch, with y drawn from p, and how many rows there are.

    For a model that predicts nothing, the sum of its last hidden state with random signs, scaled so that the square
    of a change of it is what the divergence between hidden states is.
    """
    output = real_rows(prediction(model(**batch)), batch.get("attention_mask")).float()
    if predicts(model):
        with torch.no_grad():
            labels = torch.multinomial(output.softmax(-1).cpu(), 1, generator=generator)[:, 0].to(output.device)
        return cross_entropy(output, labels, reduction="sum"), len(output)
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    scale = (2 / output.detach().square().mean(0).sum().clamp_min(1e-30)).sqrt()
    return scale * (signs * output).sum(), len(output)
