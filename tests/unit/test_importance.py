"""Importance of units sequence by sequence: its sums, the gate identity, and the ways to fuse coarse and fine."""

import pytest
import torch

from prunelm.criteria import CRITERIA, Statistics
from prunelm.data import Batches, Masking
from prunelm.errors import CalibrationError, DataError, RecipeError, UnsupportedModelError
from prunelm.gradients import sequences_of
from prunelm.importance import Importance, gate_slopes, importances
from prunelm.losses import Objective, objective
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.testing import tiny_inputs, tiny_model

KINDS = [
    ("llama", None),
    ("gpt2", None),
    ("phi3", None),
    ("bert", "BertForMaskedLM"),
    ("bert", "BertForSequenceClassification"),
    ("bert", None),
]


def _batches(model, **extra):
    inputs = [{**tiny_inputs(model, seed=seed), **extra} for seed in range(3)]
    masking = Masking(token=4, special=frozenset({0, 1, 2}))
    return Batches(batches=inputs, facts={"tokens": 72, "sequences": 6}, masking=masking)


def _model(family, model_class):
    return tiny_model(family, model_class=model_class)


@pytest.mark.parametrize(("family", "model_class"), KINDS)
def test_sums_are_those_of_whole_gradients_sequence_by_sequence(family, model_class):
    model = _model(family, model_class)
    loss = objective("auto", model, _batches(model), unlabeled="drawn")
    sites = find_sites(model)
    found = importances(model, sites, loss)
    assert all(p.grad is None for p in model.parameters())
    row = 0
    for batch in loss.batches:
        for one in sequences_of(batch):
            model.zero_grad()
            loss(model, one).backward()
            for site in sites:
                totals = {"first": 0.0, "second": 0.0, "mixed": 0.0}
                for slot in (*site.producers, site.consumer):
                    conv = slot.layer.weight.shape != weight_of(slot.layer).shape or family == "gpt2"
                    gradient = slot.layer.weight.grad.T if conv else slot.layer.weight.grad
                    e = (weight_of(slot.layer) * gradient).detach()
                    e = e if slot.axis == "out" else e.T
                    if slot.axis == "out" and bias_of(slot.layer) is not None:
                        e = torch.cat([e, (slot.layer.bias * slot.layer.bias.grad).detach()[:, None]], 1)
                    unit = e[slot.index[1]]
                    assert torch.allclose(found[site.key].signed[slot.path][row, 1], unit.sum(1), atol=1e-6)
                    totals["first"] += float(unit.abs().sum())
                    totals["second"] += float(unit.square().sum())
                    totals["mixed"] += float((unit - unit.square() / 2).abs().sum())
                for name, total in totals.items():
                    assert float(getattr(found[site.key], name)[row, 1]) == pytest.approx(total, rel=1e-4), name
            row += 1
    assert row == 6
    model.zero_grad()


@pytest.mark.parametrize(("family", "model_class"), KINDS)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gate_has_the_slope_of_the_consumers_signed_sum(family, model_class, checkpointed):
    model = _model(family, model_class)
    loss = objective("auto", model, _batches(model), unlabeled="drawn")
    sites = find_sites(model)
    by_weights = importances(model, sites, loss, checkpointed=checkpointed)
    by_gates = gate_slopes(model, sites, loss, checkpointed=checkpointed)
    for site in sites:
        expected = by_weights[site.key].signed[site.consumer.path].sum(-1).double()
        assert torch.allclose(by_gates[site.key], expected, atol=1e-6)
        assert float(expected.abs().max()) > 1e-6


def test_the_coarse_part_is_never_above_the_fine_one():
    model = tiny_model("gpt2")
    loss = objective("auto", model, _batches(model), unlabeled="drawn")
    for seen in importances(model, find_sites(model), loss).values():
        coarse = sum(signed.abs().sum(-1) for signed in seen.signed.values())
        assert bool((coarse <= seen.first + 1e-6).all())


def _made_up(samples=8, units=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(samples, units, generator=generator, dtype=torch.float64)  # noqa: E731
    return Importance(signed={"a": draw()[..., None] - 0.3}, first=1 + draw(), second=draw(), mixed=draw())


def _score(seen, **options):
    site = find_sites(tiny_model("llama"))[1]
    gates = seen.signed["a"].sum(-1)
    return CRITERIA["fused"](site, Statistics(importance=seen, gates=gates), **options)


def test_fixed_weights_mix_the_two_over_their_means():
    seen = _made_up()
    k, f = seen.signed["a"].mean(0).abs().sum(-1), seen.first.mean(0)
    k, f = k / k.mean(), f / f.mean()
    assert torch.allclose(_score(seen, fusion="fixed", alpha=1.0), k)
    assert torch.allclose(_score(seen, fusion="fixed", alpha=0.0), f)
    assert torch.allclose(_score(seen, fusion="fixed", alpha=0.25, coarse="gates"), 0.25 * k + 0.75 * f)
    assert torch.allclose(
        _score(seen, fusion="fixed", alpha=0.0, fine="second"), seen.second.mean(0) / seen.second.mean()
    )


def test_reliability_listens_to_what_varies_less():
    seen = _made_up(samples=64)
    signed = seen.signed["a"].clone()
    signed[:, 0] = 0.5
    steady = Importance(signed={"a": signed}, first=seen.first, second=seen.second, mixed=seen.mixed)
    coarse = _score(steady, fusion="fixed", alpha=1.0)
    assert float(_score(steady)[0]) == pytest.approx(float(coarse[0]))
    k = signed.abs().sum(-1) / signed.abs().sum(-1).mean()
    f = seen.first / seen.first.mean()
    share = f.var(0) / (k.var(0) + f.var(0))
    fine = _score(steady, fusion="fixed", alpha=0.0)
    assert torch.allclose(_score(steady), share * coarse + (1 - share) * fine)


def test_attention_listens_to_what_agrees_with_the_layer():
    seen = _made_up()
    k = seen.signed["a"].abs().sum(-1) / seen.signed["a"].abs().sum(-1).mean()
    f = seen.first / seen.first.mean()
    query = (k + f).mean(1) / 2
    for unit in range(5):
        logits = torch.stack([query @ k[:, unit], query @ f[:, unit]]) / 8**0.5
        share = logits.softmax(0)[0]
        coarse, fine = (_score(seen, fusion="fixed", alpha=a)[unit] for a in (1.0, 0.0))
        assert torch.allclose(_score(seen, fusion="attention")[unit], share * coarse + (1 - share) * fine)


@pytest.mark.parametrize("recipe", ["aef", "hywia"])
@pytest.mark.parametrize(("family", "model_class"), KINDS)
def test_the_recipes_prune_every_kind_of_model(recipe, family, model_class):
    model = _model(family, model_class)
    report = prune_(model, _batches(model), Recipe.load(recipe, sparsity=0.2, multiple_of=1))
    assert 0.15 < report.sparsity_of_blocks <= 0.2


def test_the_task_loss_reads_labels():
    model = tiny_model("bert", model_class="BertForSequenceClassification")
    recipe = Recipe.load("aef", sparsity=0.2, multiple_of=1, loss="task")
    with pytest.raises(DataError, match="needs labels"):
        prune_(model, _batches(model), recipe)
    report = prune_(model, _batches(model, labels=torch.tensor([0, 1])), recipe)
    assert report.sparsity_of_blocks > 0.15


def test_searched_weights_are_the_best_of_what_was_tried_and_are_reported():
    searched = {"criterion": "fused", "fusion": "searched"}
    options = {"sparsity": 0.4, "multiple_of": 1, "attention": searched, "ffn": searched, "per_block": True}
    model = tiny_model("llama")
    report = prune_(model, _batches(model), Recipe.load("aef", allocator="global", **options))
    found = {name: report.recipe.scoring(name).options for name in ("attention", "ffn")}
    assert all(o["fusion"] == "fixed" and o["alpha"] in (0.0, 0.25, 0.5, 0.75, 1.0) for o in found.values())
    (note,) = [note for note in report.notes if "fusion weights searched" in note]
    first, best = (float(x) for x in note.split("loss ")[1].split(" -> "))
    assert best <= first
    assert f"attention {found['attention']['alpha']:g}" in note
    with pytest.raises(RecipeError, match="tries whole plans"):
        prune_(tiny_model("llama"), _batches(model), Recipe.load("aef", allocator="error-curve", **options))


def test_bad_options_models_and_weights_are_named():
    for options, message in (({"fusion": "mean"}, "fusion must be one of"), ({"alpha": 2.0}, "alpha must be in")):
        with pytest.raises(RecipeError, match=message):
            CRITERIA["fused"].needs(**options)
    with pytest.raises(RecipeError, match="resolved before scoring"):
        _score(_made_up(), fusion="searched")
    bert = tiny_model("bert")
    with pytest.raises(UnsupportedModelError, match="predicts no next token"):
        prune_(bert, _batches(bert), Recipe.load("aef", sparsity=0.2, multiple_of=1, loss="next-token"))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    with pytest.raises(CalibrationError, match=r"model\.layers\.0.*gradient is not finite"):
        prune_(broken, _batches(broken), Recipe.load("aef", sparsity=0.2, multiple_of=1))


def test_searched_weights_need_scores_before_any_activation_is_measured():
    searched = {"criterion": "fused", "fusion": "searched"}
    for other, says in (("obs", "criterion 'obs' of ffn reads those"), ("l2", None)):
        recipe = Recipe.load("aef", sparsity=0.4, multiple_of=1, attention=searched, ffn={"criterion": other})
        model = tiny_model("llama")
        if says is None:
            assert prune_(model, _batches(model), recipe).sparsity_of_blocks > 0
        else:
            with pytest.raises(RecipeError, match=says):
                prune_(model, _batches(model), recipe)


class _Faint(Objective):
    """A loss with small gradients."""

    def __call__(self, model, batch, dense=None):
        return super().__call__(model, batch, dense) * 1e-4


def test_products_of_small_gradients_in_float16_are_not_rounded_to_nothing():
    sums = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama").to(dtype)
        found = importances(model, find_sites(model), _Faint(name="next-token", batches=_shifted_batches(model)))
        sums.append(torch.cat([one.first.flatten().double() for one in found.values()]))
    assert torch.allclose(sums[1], sums[0], rtol=0.3)


def _shifted_batches(model):
    return objective("next-token", model, _batches(model), unlabeled="drawn").batches
