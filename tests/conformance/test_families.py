from dataclasses import replace

import pytest
import torch

from prunelm.architectures import ARCHITECTURES, lookup
from prunelm.errors import ArchitectureError, UnsupportedModelError
from prunelm.sites import find_sites
from prunelm.testing import (
    TINY,
    check_architecture,
    check_empty_sites,
    outputs,
    silenced,
    some_units,
    tiny_inputs,
    tiny_model,
)

GROUPED = sorted(name for name, (_, _, config) in TINY.items() if "num_key_value_heads" in config)


def test_every_architecture_has_a_tiny_model():
    assert set(ARCHITECTURES) == set(TINY)


@pytest.mark.parametrize("name", sorted(TINY))
def test_removing_equals_silencing(name):
    check_architecture(lambda: tiny_model(name))


@pytest.mark.parametrize("name", sorted(TINY))
def test_whole_sublayers_can_go(name):
    check_empty_sites(lambda: tiny_model(name))


@pytest.mark.parametrize("name", GROUPED)
def test_removing_query_heads_equals_silencing(name):
    check_architecture(lambda: tiny_model(name), unit="query")


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_multi_query_attention_loses_query_heads(name):
    check_architecture(lambda: tiny_model(name, num_key_value_heads=1), unit="query")


@pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_padded_bert_of_every_kind(model_class):
    build = lambda: tiny_model("bert", model_class=model_class)  # noqa: E731
    check_architecture(build, inputs=tiny_inputs(build(), padded=True))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"do_layer_norm_before": False}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": False}),
        ("gpt2", {"n_inner": 56}),
    ],
)
def test_variants_of_families(name, overrides):
    check_architecture(lambda: tiny_model(name, **overrides))


def _planted(monkeypatch, model_type, site_name, **fault):
    """Register wrong data for a family."""
    right = lookup(model_type)
    sites = tuple(replace(s, **fault) if s.name == site_name else s for s in right.sites)
    ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES._items, model_type, replace(right, sites=sites))


@pytest.mark.parametrize(
    ("model_type", "site_name", "fault"),
    [
        ("phi3", "attention", {"attributes": {}}),
        ("phi3", "attention", {"producers": {"self_attn.qkv_proj": "group + head + head"}}),
        ("gpt_neox", "attention", {"producers": {"attention.query_key_value": "head | head | head"}}),
        ("gpt2", "attention", {"producers": {"attn.c_attn": "head + head + head"}}),
        ("gpt2", "attention", {"attributes": {"attn.num_heads": "queries"}}),
        ("llama", "ffn", {"producers": {"mlp.gate_proj": "channel"}}),
        ("bert", "attention", {"producers": {"attention.self.query": "head", "attention.self.key": "head"}}),
    ],
)
def test_planted_faults_are_caught(monkeypatch, model_type, site_name, fault):
    _planted(monkeypatch, model_type, site_name, **fault)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check_architecture(lambda: tiny_model(model_type))


def test_data_that_does_not_fit_the_weights_fails_by_name(monkeypatch):
    _planted(monkeypatch, "llama", "ffn", count="num_attention_heads")
    with pytest.raises(ArchitectureError, match=r"layers\.0\.mlp\.gate_proj: its out axis has 40 entries.*makes 6"):
        find_sites(tiny_model("llama"))


def test_uneven_widths_are_found_again():
    model = tiny_model("phi3")
    first = [site for site in find_sites(model) if site.block == 0]
    from prunelm.sites import narrow_

    narrow_(first[0], torch.tensor([0, 2]))
    narrow_(first[1], torch.arange(30))
    found = {site.key: site.n_units for site in find_sites(model)}
    assert found == {"0.attention": 2, "0.ffn": 30, "1.attention": 3, "1.ffn": 40}


def test_silencing_everything_kept_changes_nothing():
    model = tiny_model("qwen2")
    sites, fed = find_sites(model), tiny_inputs(model)
    dense = outputs(model, fed)
    with silenced(sites, {site.key: torch.arange(site.n_units) for site in sites}):
        assert torch.equal(outputs(model, fed), dense)
    with silenced(sites, {sites[0].key: some_units(sites[0])}):
        assert not torch.allclose(outputs(model, fed), dense)


@pytest.mark.parametrize("model_type", ["bloom", "mpt", "mixtral", "qwen3_moe"])
def test_refused_by_name_with_a_reason(model_type):
    with pytest.raises(UnsupportedModelError, match=f"{model_type} models cannot be pruned here: its"):
        lookup(model_type)


def test_unknown_family_lists_the_known_ones():
    with pytest.raises(UnsupportedModelError, match=r"'lama'. Did you mean 'llama'\? Supported: bert, gemma2"):
        lookup("lama")


def test_cross_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="add_cross_attention=True"):
        find_sites(tiny_model("gpt2", add_cross_attention=True))
