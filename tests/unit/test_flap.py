"""FLAP's ranking of heads and channels together, against its formula written out."""

import torch

from prunelm.criteria import CRITERIA
from prunelm.data import Batches
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites, weight_of
from prunelm.survey import standardised
from prunelm.testing import site_statistics, tiny_inputs, tiny_model


def _standardised_first(model, batches):
    """By site, FLAP's z of every unit: channels are standardised, then a head takes the mean of its own."""
    sites = find_sites(model)
    inputs = {site.key: [] for site in sites}
    hooks = [
        site.consumer.layer.register_forward_pre_hook(
            lambda _layer, args, key=site.key: inputs[key].append(args[0].double().flatten(0, 1))
        )
        for site in sites
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    found = {}
    for site in sites:
        variance = torch.cat(inputs[site.key]).var(0, correction=0)
        metric = variance * weight_of(site.consumer.layer).detach().double().square().sum(0)
        z = (metric - metric.mean()) / metric.std(correction=0)
        found[site.key] = torch.stack([z[channels].mean() for channels in site.consumer.index])
    return found


def test_heads_and_channels_are_ranked_as_the_paper_does():
    model = tiny_model("llama")
    batches = [tiny_inputs(model, seed=seed) for seed in range(6)]
    expected = _standardised_first(model, batches)
    sites = {site.key: site for site in find_sites(model)}
    for sparsity in (0.2, 0.4, 0.6):
        pruned = tiny_model("llama")
        alone = {"reconstruction": "none", "bias": False, "held_out": 0.0}
        recipe = Recipe.load("flap", sparsity=sparsity, multiple_of=1, samples=12, length=12, **alone)
        report = prune_(pruned, Batches(batches=batches, facts={"tokens": 144, "sequences": 12}), recipe)
        left, kept = int(sparsity * report.prunable), {key: set(range(s.n_units)) for key, s in sites.items()}
        for _, key, unit in sorted((float(z), key, u) for key, of in expected.items() for u, z in enumerate(of)):
            if sites[key].cost <= left and len(kept[key]) > 1:
                left -= sites[key].cost
                kept[key].remove(unit)
        assert {key: set(of.tolist()) for key, of in report.plan.kept.items()} == kept


@torch.no_grad()
def test_a_head_is_nearer_to_the_middle_than_its_channels():
    """Channels have one standard deviation; the means of heads have less, and nothing makes it one again."""
    model, recipe = tiny_model("llama"), Recipe.load("flap")
    for site in find_sites(model):
        z = standardised(site, CRITERIA["flap"](site, site_statistics(model, site)), recipe)
        spread = float(z.std(correction=0))
        assert spread < 0.9 if site.name == "attention" else abs(spread - 1) < 1e-9
