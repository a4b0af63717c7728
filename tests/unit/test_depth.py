"""Dropping a block is skipping it, in every family, and the result is an ordinary model of fewer blocks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunelm.depth import block_influence, drop_blocks_
from prunelm.errors import BudgetError
from prunelm.sites import find_blocks
from prunelm.testing import TINY, outputs, tiny_inputs, tiny_model


@pytest.mark.parametrize("family", sorted(TINY))
def test_dropping_is_skipping(family):
    model, shorter = (tiny_model(family, num_hidden_layers=3) for _ in range(2))
    drop_blocks_(shorter, [1])
    skipped = find_blocks(model)[1][1]
    skipped.forward = lambda hidden, *args, **kwargs: hidden
    fed = tiny_inputs(model, seed=1)
    assert torch.allclose(outputs(shorter, fed), outputs(model, fed), atol=1e-5)
    assert shorter.config.num_hidden_layers == len(find_blocks(shorter)[1]) == 2


def test_a_shorter_model_generates_and_opens_anywhere(tmp_path):
    model = tiny_model("qwen2", num_hidden_layers=4)
    drop_blocks_(model, [0, 2])
    fed = tiny_inputs(model, seed=1)
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(opened, fed), outputs(model, fed))
    cached, plain = (
        opened.generate(**fed, max_new_tokens=5, do_sample=False, use_cache=cache, pad_token_id=0)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_block_that_does_nothing_has_no_influence():
    model = tiny_model("llama", num_hidden_layers=3)
    before = block_influence(model, [tiny_inputs(model, seed=0)])
    silent = find_blocks(model)[1][1]
    with torch.no_grad():
        silent.self_attn.o_proj.weight.zero_()
        silent.mlp.down_proj.weight.zero_()
    after = block_influence(model, [tiny_inputs(model, seed=0)])
    assert float(after[1]) == pytest.approx(0, abs=1e-6)
    assert bool((before > 0).all())
    assert float(before[0]) == pytest.approx(float(after[0]))


@pytest.mark.parametrize("drop", [[0, 1, 2], [3], [-1]])
def test_what_cannot_be_dropped_is_refused(drop):
    with pytest.raises(BudgetError, match="cannot drop blocks"):
        drop_blocks_(tiny_model("llama", num_hidden_layers=3), drop)
