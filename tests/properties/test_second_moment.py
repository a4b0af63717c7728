import pytest
import torch

from prunelm.criteria import CRITERIA, Statistics
from prunelm.moments import Moments
from prunelm.pruning import removed_energy
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.stream import BlockStream
from prunelm.testing import site_statistics, tiny_inputs, tiny_model

second_moment = CRITERIA["second-moment"]


def _site(model, name):
    return next(site for site in find_sites(model) if site.name == name and site.block == 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt"])
@pytest.mark.parametrize("kind", ["attention", "ffn"])
@torch.no_grad()
def test_the_exact_form_of_one_channel_is_its_measured_output_energy(name, kind):
    model = tiny_model(name)
    site = _site(model, kind)
    statistics = site_statistics(model, site)
    scores = second_moment(site, statistics)
    stream = BlockStream(model, [tiny_inputs(model)])
    (a,) = stream.capture(0, 0, [site.spec.consumer[0]])
    weight = weight_of(site.consumer.layer)
    for unit in range(site.n_units):
        energies = [(a[:, c, None] * weight[:, c]).square().sum(-1).mean() for c in site.consumer.index[unit]]
        assert float(scores[unit]) == pytest.approx(float(sum(energies)), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert"])
@torch.no_grad()
def test_attention_needs_no_attention_weighted_covariance(name):
    """A_c S^ A_c^T with the attention-weighted input x^ is E[a_c^2]: shown on the real attention maps."""
    model = tiny_model(name)
    site = _site(model, "attention")
    stream = BlockStream(model, [tiny_inputs(model)])
    (x,) = stream.capture(0, 0, [next(iter(site.spec.producers))])
    p = stream.attention_probabilities(0, 0, site.spec.probabilities, slice(2))
    layer, rows = site.value
    weight, bias = weight_of(layer), bias_of(layer)
    hidden = x.reshape(2, 12, -1)
    columns = weight_of(site.consumer.layer).square().sum(0)
    expected = torch.zeros(site.n_units)
    per_unit = site.n_units and site.consumer.index.shape[1] // site.head_dim
    for unit in range(site.n_units):
        for k in range(per_unit):
            mixed = p[:, unit * per_unit + k] @ hidden  # x^ of this head
            for d in range(site.head_dim):
                position = k * site.head_dim + d
                row = rows[unit, position]
                value = mixed @ weight[row] + (bias[row] if bias is not None else 0)
                expected[unit] += columns[site.consumer.index[unit, position]] * value.square().mean()
    gaussian = second_moment(site, site_statistics(model, site), form="gaussian")
    assert torch.allclose(gaussian.float(), expected, rtol=1e-3)


@torch.no_grad()
def test_the_gaussian_form_with_bias_is_the_energy_of_the_preactivation():
    model = tiny_model("gpt2")
    site = _site(model, "ffn")
    statistics = site_statistics(model, site)
    (x,) = BlockStream(model, [tiny_inputs(model)]).capture(0, 0, ["mlp.c_fc"])
    layer = site.producers[0].layer
    z = x @ weight_of(layer).T + bias_of(layer)
    columns = weight_of(site.consumer.layer).square().sum(0)
    expected = 0.5 * columns * z.square().mean(0)
    assert torch.allclose(second_moment(site, statistics, form="gaussian").float(), expected, rtol=1e-3)


def test_half_is_exact_for_relu_on_centered_gaussians():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400_000, generator=generator) * 3
    assert float(z.relu().square().mean()) == pytest.approx(0.5 * 9, rel=0.02)


@torch.no_grad()
def test_the_gated_product_counts_the_column_norm_twice_only_as_printed():
    model = tiny_model("llama")
    site = _site(model, "ffn")
    statistics = site_statistics(model, site)
    (x,) = BlockStream(model, [tiny_inputs(model)]).capture(0, 0, ["mlp.gate_proj"])
    gate, up = ((x @ weight_of(slot.layer).T).square().mean(0) for slot in site.producers)
    norm = weight_of(site.consumer.layer).square().sum(0)
    paper = second_moment(site, statistics, form="gaussian", gated="paper")
    single = second_moment(site, statistics, form="gaussian", gated="single-norm")
    assert torch.allclose(paper.float(), (norm * up) * (0.5 * norm * gate), rtol=1e-3)
    assert torch.allclose(single.float(), 0.5 * norm * up * gate, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_identity_needs_no_data_and_equals_unit_covariance(name):
    model = tiny_model(name)
    site = _site(model, "ffn")
    unit = Moments(48)
    unit.tokens, unit.gram = 1, torch.eye(48, dtype=torch.float64)
    plain = second_moment(site, Statistics(), form="identity")
    assert torch.allclose(plain, second_moment(site, Statistics(producer=unit), form="gaussian"))
    assert second_moment(_site(model, "attention"), Statistics(), form="identity").shape == (3,)


@torch.no_grad()
def test_removed_energy_is_the_measured_error_of_silencing():
    model = tiny_model("gpt2")
    site = _site(model, "ffn")
    statistics = site_statistics(model, site)
    (a,) = BlockStream(model, [tiny_inputs(model)]).capture(0, 0, ["mlp.c_proj"])
    weight = weight_of(site.consumer.layer)
    kept = torch.arange(0, site.n_units, 2)
    gone = torch.arange(1, site.n_units, 2)
    measured = float((a[:, gone] @ weight[:, gone].T).square().sum() / (a @ weight.T).square().sum())
    assert removed_energy(site, statistics.consumer, kept) == pytest.approx(measured, rel=1e-4)
