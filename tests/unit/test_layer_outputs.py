"""Attention in front of an FFN site runs once less, and the weights are those that it gives when it runs again."""

from dataclasses import replace

import pytest
import torch

from prunelm.data import Batches
from prunelm.layer_outputs import LayerOutputs
from prunelm.pruning import _Work, prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.testing import TINY, tiny_inputs, tiny_model

RECIPE = Recipe.load("obs", sparsity=0.2, multiple_of=1, samples=8, length=12)


def _attention_runs(model, recipe):
    """The weights after pruning, and how often the attention of the first block ran."""
    site = next(site for site in find_sites(model) if site.spec.probabilities is not None)
    batches = [tiny_inputs(model, seed=seed, padded=seed == 1) for seed in range(4)]
    runs = []
    handle = site.producers[0].layer.register_forward_hook(lambda *_: runs.append(1))
    prune_(model, Batches(batches=batches, facts={"tokens": 96, "sequences": 8}), recipe)
    handle.remove()
    return model.state_dict(), len(runs)


@pytest.mark.parametrize("sites", [("ffn",), ("attention", "ffn")], ids="-".join)
@pytest.mark.parametrize("family", sorted(TINY))
def test_attention_that_cannot_change_any_more_runs_once_less(family, sites, monkeypatch):
    recipe = replace(RECIPE, sites=sites)
    known, fewer = _attention_runs(tiny_model(family), recipe)
    monkeypatch.setattr(_Work, "_attention_outputs", lambda *_: None)
    model = tiny_model(family)
    gives_probabilities = model.config._attn_implementation == "eager"
    again, more = _attention_runs(model, recipe)
    assert fewer == more if gives_probabilities else fewer < more
    for name, weight in again.items():
        torch.testing.assert_close(known[name], weight, rtol=0, atol=0)


def test_an_output_is_given_once_and_then_forgotten():
    layer, runs = torch.nn.Linear(2, 2), []
    own = layer.forward
    layer.forward = lambda x: (runs.append(1), own(x))[1]
    known = LayerOutputs(layer)
    for _ in range(3):
        with known.of(0):
            layer(torch.ones(2))
    assert len(runs) == 2


def test_an_output_with_probabilities_beside_it_is_computed_again():
    layer, runs = torch.nn.Identity(), []
    layer.forward = lambda x: (runs.append(1), (x, x))[1]
    known = LayerOutputs(layer)
    for _ in range(2):
        with known.of(0):
            layer(torch.ones(2))
    assert len(runs) == 2
