"""What baselines and criteria compute, against their formulas written out unit by unit."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from prunelm.criteria import CRITERIA
from prunelm.depth import block_influence
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.stream import BlockStream
from prunelm.testing import site_statistics, tiny_inputs, tiny_model

SITES = [("llama", "attention"), ("llama", "ffn"), ("gpt2", "ffn")]


def _site(model, name):
    return next(site for site in find_sites(model) if site.name == name and site.block == 0)


@torch.no_grad()
def _scored(name, site, statistics, **options):
    return CRITERIA[name](site, statistics, **options)


def _seen(family, kind):
    """A model, its first site of a kind, the statistics of it, and the rows of tokens that the consumer reads."""
    model = tiny_model(family)
    site = _site(model, kind)
    with torch.no_grad():
        (read,) = BlockStream(model, [tiny_inputs(model)]).capture(0, 0, [site.spec.consumer[0]])
    return site, site_statistics(model, site), read.double(), weight_of(site.consumer.layer).detach().double()


def _weights(site, unit):
    """Every weight that goes with a unit: rows of producers, columns of the consumer."""
    parts = []
    for slot in (*site.producers, site.consumer):
        weight = weight_of(slot.layer).detach().double()
        parts.append((weight if slot.axis == "out" else weight.T)[slot.index[unit]].flatten())
    return torch.cat(parts)


@pytest.mark.parametrize(("family", "kind"), SITES)
def test_wanda_sp(family, kind):
    site, statistics, read, weight = _seen(family, kind)
    scores = _scored("wanda-sp", site, statistics)
    for unit, channels in enumerate(site.consumer.index):
        expected = sum(weight[:, c].abs().mean() * read[:, c].square().mean().sqrt() for c in channels)
        assert float(scores[unit]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("family", "kind"), SITES)
def test_flap(family, kind):
    site, statistics, read, weight = _seen(family, kind)
    lost = torch.stack([read[:, c].var(correction=0) * weight[:, c].square().sum() for c in range(read.shape[1])])
    scores = _scored("flap", site, statistics)
    for unit, channels in enumerate(site.consumer.index):
        assert float(scores[unit]) == pytest.approx(float(lost[channels].mean() / lost.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize(("family", "kind"), SITES)
@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_weight_norms(family, kind, name, power):
    site, statistics, _, _ = _seen(family, kind)
    scores = _scored(name, site, statistics)
    for unit in range(site.n_units):
        assert float(scores[unit]) == pytest.approx(float(_weights(site, unit).norm(power)), rel=1e-5)


@pytest.mark.parametrize(("family", "kind"), SITES)
def test_snip(family, kind):
    site, statistics, _, _ = _seen(family, kind)
    slopes = [abs(float(statistics.gates[:, unit].mean())) for unit in range(site.n_units)]
    scores = _scored("snip", site, statistics)
    assert scores.tolist() == pytest.approx([slope / sum(slopes) for slope in slopes], rel=1e-5)


@pytest.mark.parametrize(("family", "kind"), [("llama", "attention"), ("llama", "ffn")])
@pytest.mark.parametrize("shrink", [0.3, 1.0])
def test_obs_in_the_metric_of_the_output_is_the_error_left_after_refitting(family, kind, shrink):
    """tr(G' E) / tr(G' Y): E and Y second moments of the error and of the output, G' the shrunk Fisher matrix."""
    site, statistics, read, weight = _seen(family, kind)
    metric = (1 - shrink) * statistics.fisher.double()
    metric += shrink * statistics.fisher.double().diagonal().mean() * torch.eye(len(metric))
    options = {"metric": "output", "shrink": shrink, "ridge": 1e-2}
    scores = _scored("obs", site, statistics, **options)
    second = read.T @ read / len(read)
    damped = second + torch.diag(options["ridge"] * second.diagonal())
    assert bias_of(site.consumer.layer) is None
    order = scores.argsort()
    for count in range(1, min(site.n_units, 6)):
        gone = site.consumer.index[order[:count]].flatten()
        kept = torch.tensor([c for c in range(read.shape[1]) if c not in set(gone.tolist())])
        left = damped[gone][:, gone] - damped[gone][:, kept] @ damped[kept][:, kept].inverse() @ damped[kept][:, gone]
        error = weight[:, gone] @ left @ weight[:, gone].T
        whole = weight @ second @ weight.T
        expected = (metric * error).sum() / (metric * whole).sum()
        assert float(scores[order[count - 1]]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["best", "best-uniform"])
def test_the_default_recipes_measure_errors_at_the_output(name):
    recipe = Recipe.load(name)
    assert [recipe.scoring(kind).options.get("metric") for kind in recipe.sites] == ["output"] * len(recipe.sites)


def test_block_influence():
    model = tiny_model("llama", num_hidden_layers=3)
    fed = [tiny_inputs(model, seed=seed) for seed in range(2)]
    with torch.no_grad():
        states = [model.model(**batch, output_hidden_states=True).hidden_states for batch in fed]
    found = block_influence(model, fed)
    for i in range(2):  # behind the last block, transformers gives the state after the norm
        cosines = [cosine_similarity(of[i].double(), of[i + 1].double(), dim=-1).flatten() for of in states]
        assert float(found[i]) == pytest.approx(1 - float(torch.cat(cosines).mean()), abs=1e-6)
