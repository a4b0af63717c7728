"""What a model writes itself is drawn from its predictions, whatever its folder says of how to generate."""

import pytest
import torch
from tests.conftest import VOCAB_SIZE

from prunelm.generate import self_generated
from prunelm.testing import tiny_model

SIZES = {"samples": 2, "length": 16, "seed": 0}


@pytest.mark.parametrize("setting", [{"temperature": 0.01}, {"top_p": 0.05}, {"repetition_penalty": 9.0}])
def test_settings_of_generation_change_nothing(setting, byte_tokenizer):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE)
    plain = self_generated(model, byte_tokenizer, **SIZES)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    assert self_generated(model, byte_tokenizer, **SIZES).facts == plain.facts
    assert all(getattr(model.generation_config, name) == value for name, value in setting.items())


def test_several_ends_of_a_text_and_no_padding(byte_tokenizer):
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, pad_token_id=None, eos_token_id=[2, 3])
    (batch,) = self_generated(model, byte_tokenizer, **SIZES).batches
    assert batch["input_ids"].shape == (2, 16)
    assert not torch.isin(batch["input_ids"][:, 1:], torch.tensor([2, 3])).any()


def test_first_tokens_are_of_the_tokenizer(byte_tokenizer, monkeypatch):
    model, begun = tiny_model("llama", vocab_size=50 * VOCAB_SIZE), []
    monkeypatch.setattr(type(byte_tokenizer), "bos_token_id", None, raising=False)
    monkeypatch.setattr(model, "generate", lambda first, **_: begun.append(first.clone()) or first.expand(-1, 16))
    self_generated(model, byte_tokenizer, samples=32, length=16, seed=0)
    assert int(begun[0].max()) < len(byte_tokenizer)
    assert len(begun[0].unique()) > 1
