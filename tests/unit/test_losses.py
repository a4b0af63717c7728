"""Losses: what they count, what they hide, and what they refuse."""

import pytest
import torch

from prunelm.data import Batches, Masking
from prunelm.errors import DataError, UnsupportedModelError
from prunelm.losses import answers, masked, next_token_loss, objective
from prunelm.testing import tiny_inputs, tiny_model

MASKING = Masking(token=4, special=frozenset({0, 1, 2, 4}))


def _batches(model, **extra):
    inputs = {**tiny_inputs(model, padded=True), **extra}
    return Batches(batches=[inputs], facts={"tokens": 20, "sequences": 2}, masking=MASKING)


@torch.no_grad()
def test_padding_does_not_count_in_the_next_token_loss():
    model = tiny_model("llama")
    padded = tiny_inputs(model, padded=True)
    short = {name: value[1:, :8] for name, value in padded.items()}
    alone = {name: value[1:] for name, value in padded.items()}
    assert float(next_token_loss(model, alone)) == pytest.approx(float(next_token_loss(model, short)), rel=1e-5)
    found = objective("auto", model, _batches(model), unlabeled="kl")
    assert found.name == "next-token"
    assert float(found(model, found.batches[0])) == pytest.approx(float(next_token_loss(model, padded)))


def test_masked_tokens_are_neither_special_nor_padding_and_are_the_only_labels():
    ids = torch.randint(5, 90, (6, 40), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 20] = 1, 2
    mask = torch.ones_like(ids)
    mask[3:, 30:] = 0
    (found,) = masked([{"input_ids": ids, "attention_mask": mask}], MASKING, 7)
    hidden = found["labels"] != -100
    assert bool((found["input_ids"][hidden] == MASKING.token).all())
    assert torch.equal(found["labels"][hidden], ids[hidden])
    assert torch.equal(found["input_ids"][~hidden], ids[~hidden])
    assert not bool((hidden & ((ids < 5) | (mask == 0))).any())
    assert bool(hidden.any(1).all())
    assert 0.05 < float(hidden.float().mean()) < 0.25
    (again,) = masked([{"input_ids": ids, "attention_mask": mask}], MASKING, 7)
    assert torch.equal(again["input_ids"], found["input_ids"])


def test_masked_models_are_asked_for_masked_tokens():
    model = tiny_model("bert", model_class="BertForMaskedLM")
    found = objective("auto", model, _batches(model), unlabeled="kl")
    assert found.name == "masked-lm"
    logits = model(**{k: v for k, v in found.batches[0].items() if k != "labels"}).logits
    labels = found.batches[0]["labels"]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert torch.allclose(found(model, found.batches[0]), expected)


def test_classifiers_are_asked_for_their_labels_where_there_are_any():
    model = tiny_model("bert", model_class="BertForSequenceClassification", num_labels=3)
    labeled = _batches(model, labels=torch.tensor([2, 0]))
    found = objective("task", model, labeled, unlabeled="kl")
    logits = model(**tiny_inputs(model, padded=True)).logits
    assert torch.allclose(
        found(model, found.batches[0]), torch.nn.functional.cross_entropy(logits, torch.tensor([2, 0]))
    )
    with pytest.raises(DataError, match="needs labels, and the calibration text has none"):
        objective("task", model, _batches(model), unlabeled="kl")
    assert objective("auto", model, labeled, unlabeled="drawn").name == "drawn"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_divergence_from_itself_is_nothing(family):
    model = tiny_model(family)
    found = objective("kl", model, _batches(model), unlabeled="kl")
    batch = found.batches[0]
    dense = answers(model, batch)
    assert dense.shape[0] == 20
    assert float(found(model, batch, dense)) == pytest.approx(0, abs=1e-6)
    next(model.parameters()).mul_(1.1)
    assert float(found(model, batch, dense)) > 1e-4


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("next-token", "bert", "predicts no next token"),
        ("masked-lm", "llama", "predicts no masked token"),
        ("task", "llama", "is no classifier"),
    ],
)
def test_a_loss_that_a_model_does_not_have_is_refused(name, family, message):
    model = tiny_model(family)
    with pytest.raises(UnsupportedModelError, match=message):
        objective(name, model, _batches(model), unlabeled="kl")


def test_a_tokenizer_without_a_mask_token_is_named():
    model = tiny_model("bert", model_class="BertForMaskedLM")
    batches = Batches(batches=[tiny_inputs(model)], facts={"tokens": 24, "sequences": 2})
    with pytest.raises(DataError, match="the tokenizer has none"):
        objective("auto", model, batches, unlabeled="kl")
