"""Measured speed copes with whatever pruning leaves."""

import torch

from prunelm.sites import find_sites, narrow_
from prunelm.speed import cache_bytes, decode_seconds
from prunelm.testing import tiny_model


def test_attention_that_is_gone_keeps_no_cache() -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    whole = cache_bytes(model, 8)
    narrow_(next(site for site in find_sites(model) if site.key == "1.attention"), torch.arange(0))
    assert cache_bytes(model, 8) == whole * 2 // 3
    assert min(decode_seconds(model, 8, 4)) > 0
