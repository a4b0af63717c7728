import pytest
import torch

from prunelm.criteria import CRITERIA, Statistics
from prunelm.data import Batches
from prunelm.errors import CalibrationError, RecipeError, UnsupportedModelError
from prunelm.gradients import collect
from prunelm.losses import next_token_loss
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.testing import tiny_inputs, tiny_model


def _batches(model, count=3):
    return [tiny_inputs(model, seed=seed) for seed in range(count)]


def _statistics(model, batches):
    return Statistics(gradients=collect(model, batches, find_sites(model)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_gradients_are_those_of_autograd_sequence_by_sequence(family):
    model, reference = tiny_model(family), tiny_model(family)
    batches = _batches(model, 2)
    found = collect(model, batches, find_sites(model))
    singles = [{name: value[r : r + 1] for name, value in b.items()} for b in batches for r in range(2)]
    sums = {path: [torch.zeros_like(g.mean), torch.zeros_like(g.square)] for path, g in found.items()}
    layers = {path: reference.get_submodule(path) for path in found}
    for one in singles:
        reference.zero_grad()
        next_token_loss(reference, one).backward()
        for path, layer in layers.items():
            grad = layer.weight.grad if weight_of(layer).shape == layer.weight.shape else layer.weight.grad.T
            grad = grad if family != "gpt2" else layer.weight.grad.T
            sums[path][0] += grad / 4
            sums[path][1] += grad.square() / 4
    for path, gradient in found.items():
        assert torch.allclose(gradient.mean, sums[path][0], atol=1e-6)
        assert torch.allclose(gradient.square, sums[path][1], atol=1e-6)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["attention", "ffn"])
def test_the_coarse_form_is_the_derivative_by_a_gate_on_the_unit(name):
    """Scaling the consumer's columns of a channel by a gate m gives dL/dm = sum w g at m = 1."""
    model = tiny_model("llama")
    site = next(s for s in find_sites(model) if s.name == name)
    batch = {key: value[:1] for key, value in tiny_inputs(model).items()}
    gradient = collect(model, [batch], [site])[site.consumer.path]
    weight = weight_of(site.consumer.layer)
    gate = torch.ones(weight.shape[1], requires_grad=True)
    handle = site.consumer.layer.register_forward_pre_hook(lambda _m, args: (args[0] * gate,))
    next_token_loss(model, batch).backward()
    handle.remove()
    assert torch.allclose(gate.grad, (weight.detach() * gradient.mean).sum(0), atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_coarse_form_is_never_above_the_fine_one(family):
    model = tiny_model(family)
    statistics = _statistics(model, _batches(model))
    for site in find_sites(model):
        coarse, fine = (CRITERIA["taylor"](site, statistics, form=form) for form in ("vector", "first"))
        assert bool((coarse <= fine + 1e-12).all())
        assert bool((coarse < fine).any())


def test_the_forms_are_what_they_say():
    model = tiny_model("gpt2")
    statistics = _statistics(model, _batches(model))
    site = find_sites(model)[1]
    expected = {form: torch.zeros(site.n_units, dtype=torch.float64) for form in ("vector", "first", "second", "mixed")}
    for slot in (*site.producers, site.consumer):
        w = weight_of(slot.layer).detach().double()
        g, f = statistics.gradients[slot.path].mean, statistics.gradients[slot.path].square
        for unit in range(site.n_units):
            rows = slot.index[unit]
            w_, g_, f_ = (t[rows] if slot.axis == "out" else t[:, rows] for t in (w, g, f))
            first, second = w_ * g_, w_.square() * f_
            expected["vector"][unit] += first.sum().abs()
            expected["first"][unit] += first.abs().sum()
            expected["second"][unit] += second.sum()
            expected["mixed"][unit] += (first - second / 2).abs().sum()
    for form, scores in expected.items():
        assert torch.allclose(CRITERIA["taylor"](site, statistics, form=form), scores, rtol=1e-6), form


@pytest.mark.parametrize("recipe", ["taylor-vector", "taylor-first", "taylor-second"])
def test_the_recipes_prune(recipe):
    model = tiny_model("llama")
    calibration = Batches(batches=_batches(model), facts={"tokens": 72, "sequences": 6})
    report = prune_(model, calibration, Recipe.load(recipe, sparsity=0.3, multiple_of=1))
    assert 0.25 < report.sparsity_of_blocks <= 0.3
    assert bias_of(find_sites(model)[0].consumer.layer) is None


def test_models_without_that_loss_and_broken_weights_are_named():
    encoder = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match="predicts no next token"):
        collect(encoder, _batches(encoder), find_sites(encoder))
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model\.layers\.0.*gradient is not finite"):
        collect(model, _batches(model), find_sites(model))
    with pytest.raises(RecipeError, match="form must be one of"):
        CRITERIA["taylor"].needs(form="third")
