"""The policy gradient is unbiased, its projection optimal; searches improve on their start, and can go on later."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunelm.data import Batches
from prunelm.errors import BudgetError, CalibrationError, DataError, RecipeError
from prunelm.job import prepare_
from prunelm.journal import Journal, read_journal
from prunelm.losses import Objective, objective
from prunelm.masking import masking
from prunelm.plan import Budget, prunable
from prunelm.policy import Policy, compared_with, projected, rate_at, score_gradient, started
from prunelm.policy_search import search
from prunelm.probable import least_probable_blocks, most_probable
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.testing import outputs, silenced, some_units, tiny_inputs, tiny_model

STEPS = 40


def _loss(mask: torch.Tensor) -> float:
    """Some function of a mask, with interactions."""
    m = mask.double()
    n = len(m)
    return float((m @ torch.arange(1, n + 1, dtype=torch.float64)).sin() + (m[:-1] * m[1:]).sum() - 2 * m.prod())


def _probability(mask: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, s, 1 - s).prod()


def _masks(n: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=n)))


def _expected_slope(s: torch.Tensor) -> torch.Tensor:
    """The gradient of E[L] by central differences of its enumerated sum."""
    masks, step = _masks(len(s)), 1e-5
    losses = torch.tensor([_loss(m) for m in masks], dtype=torch.float64)

    def mean(at: torch.Tensor) -> torch.Tensor:
        return sum(_probability(m, at) * loss for m, loss in zip(masks, losses, strict=True))

    basis = torch.eye(len(s), dtype=torch.float64) * step
    return torch.stack([(mean(s + e) - mean(s - e)) / (2 * step) for e in basis])


def _expected_estimate(s: torch.Tensor, policy: Policy, average: float) -> torch.Tensor:
    """The mean of the estimator over every pair of masks."""
    total = torch.zeros_like(s)
    for first, second in itertools.product(_masks(len(s)), repeat=2):
        masks = torch.stack([first, second])
        losses = torch.tensor([_loss(first), _loss(second)], dtype=torch.float64)
        against, _ = compared_with(losses, policy, average)
        weight = _probability(first, s) * _probability(second, s)
        total += weight * score_gradient(losses, masks, s, against, policy.estimator)
    return total


@pytest.mark.parametrize("n", [2, 4, 6])
def test_the_plain_estimator_is_unbiased(n):
    s = torch.linspace(0.15, 0.9, n, dtype=torch.float64)
    policy = Policy(estimator="plain", baseline="leave-one-out")
    assert torch.allclose(_expected_estimate(s, policy, 0.3), _expected_slope(s), atol=1e-8)


@pytest.mark.parametrize("window", [5, 10])
def test_the_released_estimator_is_a_positive_scaling_of_the_gradient(window):
    s = torch.tensor([0.2, 0.5, 0.85, 0.6], dtype=torch.float64)
    found = _expected_estimate(s, Policy(window=window), 0.7)
    scale = 2 * (1 - 1 / (2 * window)) * (s * (1 - s)).sqrt()
    assert torch.allclose(found, scale * _expected_slope(s), atol=1e-8)


def test_probabilities_of_zero_and_one_do_not_move():
    s = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    masks = torch.tensor([[False, True, True], [False, True, False]])
    losses = torch.tensor([1.0, 2.0], dtype=torch.float64)
    for estimator in ("sqrt", "plain"):
        moved = score_gradient(losses, masks, s, losses.mean().expand(2), estimator)
        assert moved[:2].tolist() == [0.0, 0.0]
        assert moved[2] < 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 8), st.floats(0, 1.2))
def test_the_projection_is_the_nearest_feasible_point(seed, n, share):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(n, generator=generator, dtype=torch.float64) + 0.5
    cost = torch.rand(n, generator=generator, dtype=torch.float64) * 5 + 0.1
    budget = share * float(cost.sum())
    found = projected(s, cost, budget)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(cost @ found) <= budget + 1e-9
    others = torch.rand(400, n, generator=generator, dtype=torch.float64)
    others *= (budget / (others @ cost)).clamp(max=1)[:, None]
    nearest = (others - s).square().sum(1).min()
    assert float((found - s).square().sum()) <= float(nearest) + 1e-9


def test_a_negative_budget_is_refused():
    with pytest.raises(RecipeError, match="cannot hold any unit"):
        projected(torch.ones(2), torch.ones(2), -1.0)


@pytest.mark.parametrize("start", ["sigmap", "constant", "metric"])
def test_every_layer_starts_with_the_same_mean_and_the_order_of_its_scores(start):
    metric = torch.tensor([1.0, 4.0, 2.0, 3.0, 100.0, 400.0, 300.0, 200.0], dtype=torch.float64)
    layers = [torch.arange(4), torch.arange(4, 8)]
    s = started(metric, layers, torch.full((8,), 0.5, dtype=torch.float64), Policy(start=start))
    assert torch.allclose(s[:4].mean(), s[4:].mean())
    assert s.mean() == pytest.approx(0.5)
    for mine in layers:
        assert (s[mine][metric[mine].argsort()].diff() >= 0).all()


def test_the_rate_falls_to_nothing():
    policy = Policy(steps=10, rate=0.5)
    rates = [rate_at(policy, n) for n in range(11)]
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert rates[10] == pytest.approx(0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_mask_silences_what_removal_would_remove(family):
    model = tiny_model(family)
    sites = find_sites(model)
    kept = {site.key: some_units(site) for site in sites}
    inputs = tiny_inputs(model)
    with silenced(sites, kept):
        expected = outputs(model, inputs)
    whole = outputs(model, inputs)
    with masking(model, sites) as mask:
        mask.keep(kept)
        assert torch.equal(outputs(model, inputs), expected)
        mask.skip([1])
        assert not torch.equal(outputs(model, inputs), whole)
    assert torch.equal(outputs(model, inputs), whole)


def _recipe(**changes):
    policy = {
        "steps": STEPS,
        "rate": 0.1,
        "pool": "all",
        "ffn_groups": 10,
        "save_every": 10,
        **changes.pop("policy", {}),
    }
    values = {"sparsity": 0.4, "multiple_of": 1, "held_out": 0.25, "per_block": True, "loss": "kl", "policy": policy}
    return Recipe.load("wanda-sp", **{**values, **changes})


def _calibration(model, count=8):
    batches = [tiny_inputs(model, seed=seed) for seed in range(count)]
    return Batches(batches=batches, facts={"tokens": 24 * count, "sequences": 2 * count})


def _arguments(recipe, model):
    """A search over a tiny model with half of its units louder, from scores that are the wrong way round."""
    job = prepare_(model, recipe)
    with torch.no_grad():
        for site in job.sites:
            site.consumer.layer.weight[:, : len(site.consumer.index.flatten()) // 2] *= 4
    batches = _calibration(model)
    fit, held = batches.split(0.25)
    metric = {}
    for site in job.sites:
        columns = site.consumer.layer.weight.detach().square().sum(0)
        metric[site.key] = -columns[site.consumer.index].sum(1).double()
    loss, judge = (objective("kl", model, part, unlabeled="kl") for part in (fit, held))
    return model, job, metric, recipe.policy, loss, judge


def test_a_search_improves_on_a_bad_start():
    found = search(*_arguments(_recipe(policy={"masks": 4}), tiny_model("llama")), seed=0)
    assert found.end < 0.95 * found.start
    assert f"{found.start:.4f} -> {found.end:.4f}" in found.notes[0]


def test_no_steps_keep_the_start_and_say_so():
    found = search(*_arguments(_recipe(policy={"steps": 0}), tiny_model("llama")), seed=0)
    assert found.end == found.start
    assert "so the start was kept" in found.notes[0]


def test_an_interrupted_search_ends_as_if_it_had_not_been(tmp_path):
    arguments = _arguments(_recipe(), tiny_model("llama"))
    path = tmp_path / "search.jsonl"
    whole = search(*arguments, seed=3, journal=Journal(path, {"of": "this"}))
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + STEPS // 10
    path.write_text("\n".join(lines[:3]) + "\n")
    again = search(*arguments, seed=3, journal=Journal(path, {"of": "this"}))
    assert path.read_text().splitlines() == lines
    assert (again.start, again.end) == (whole.start, whole.end)
    assert all(torch.equal(again.scores[key], whole.scores[key]) for key in whole.scores)


class _Failing(Objective):
    """A loss that is not finite from its n-th call on."""

    def __call__(self, model, batch, dense=None):
        self.calls.append(1)
        return torch.tensor(float("nan") if len(self.calls) > self.last else 1.0 + 0.1 * (len(self.calls) % 2))


def _failing(last: int) -> Objective:
    loss = _Failing(name="next-token", batches=[dict(tiny_inputs(tiny_model("llama")))])
    object.__setattr__(loss, "calls", [])
    object.__setattr__(loss, "last", last)
    return loss


def test_a_search_that_diverges_names_the_step_and_keeps_the_last_good_state(tmp_path):
    model, job, metric, policy, _, held = _arguments(_recipe(), tiny_model("llama"))
    path = tmp_path / "search.jsonl"
    arguments = (model, job, metric, policy)
    found = search(*arguments, _failing(2 * 17), held, seed=0, journal=Journal(path, {}))
    assert any("diverged at step 17 of 40" in note for note in found.notes)
    last = read_journal(path)[-1]
    assert last["diverged"] == 17
    assert all(0 <= s <= 1 for s in last["s"])
    with pytest.raises(CalibrationError, match="step 0 of the search"):
        search(*arguments, _failing(0), held, seed=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 0.7), st.sampled_from(["kind", "all"]), st.sampled_from([1, 4]))
def test_plans_meet_the_budget_and_take_the_least_likely(seed, sparsity, pool, multiple_of):
    sites = find_sites(tiny_model("llama", num_hidden_layers=3))
    total = prunable(sites)
    budget = Budget(target=int(sparsity * total), total=total, multiple_of=multiple_of)
    generator = torch.Generator().manual_seed(seed)
    scores = {site.key: torch.rand(site.n_units, generator=generator, dtype=torch.float64) for site in sites}
    try:
        counts, step = most_probable(sites, budget, scores, Policy(pool=pool))
    except BudgetError:
        assert sparsity > 0.6
        return
    removed = sum((site.n_units - counts[site.key]) * site.cost for site in sites)
    assert budget.target - step < removed <= budget.target
    assert all(site.name == "attention" or counts[site.key] % multiple_of == 0 for site in sites)


@pytest.mark.parametrize(
    ("family", "policy", "changes"),
    [
        ("llama", {"pool": "kind", "ffn_groups": 0, "start": "constant"}, {}),
        ("gpt2", {"pool": "all", "grouping": "adjacent", "baseline": "leave-one-out"}, {}),
        ("bert", {"pool": "all", "start": "metric", "estimator": "plain", "rate": 0.01}, {}),
        ("llama", {"pool": "block"}, {"per_block": False}),
        ("llama", {"pool": "kind"}, {"reconstruction": "least-squares", "ridge": 0.1}),
        ("llama", {"pool": "all"}, {"loss": "auto"}),
    ],
)
def test_every_kind_of_policy_prunes_to_its_budget(family, policy, changes):
    model = tiny_model(family, num_hidden_layers=3)
    report = prune_(model, _calibration(model), _recipe(policy={"steps": 10, **policy}, **changes))
    assert 0.33 < report.sparsity_of_blocks <= 0.4
    assert any("keep probabilities: held-out loss" in note for note in report.notes)
    assert bool(torch.isfinite(outputs(model, tiny_inputs(model))).all())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_whole_sublayers_and_whole_blocks_can_go(family):
    model = tiny_model(family, num_hidden_layers=4)
    changes = {"min_units": 0, "policy": {"steps": 10, "layers": "sublayer"}}
    report = prune_(model, _calibration(model), _recipe(**changes))
    kept = {key: (site["kept"], site["units"]) for key, site in report.sites.items()}
    assert {n in (0, units) for n, units in kept.values()} == {True}
    assert 0 < report.sparsity_of_blocks <= 0.4
    model = tiny_model(family, num_hidden_layers=4)
    changes = {"per_block": False, "sparsity": 0.5, "policy": {"steps": 10, "layers": "block"}}
    report = prune_(model, _calibration(model), _recipe(**changes))
    assert len(report.dropped_blocks) == 2
    assert report.sparsity_of_blocks == 0.5
    assert model.config.num_hidden_layers == 2
    with pytest.raises(BudgetError, match=r"cannot be met by whole blocks: one has .* ask for at least 0\.25"):
        prune_(tiny_model(family, num_hidden_layers=4), _calibration(model), _recipe(**{**changes, "sparsity": 0.1}))


def test_the_first_attention_of_a_model_that_generates_stays():
    recipe = _recipe(min_units=0, sparsity=0.6, policy={"steps": 0, "layers": "sublayer", "pool": "kind"})
    for family, stays in (("llama", True), ("bert", False)):
        job = prepare_(tiny_model(family), recipe)
        first = next(site for site in job.sites if site.key == "0.attention")
        assert (first.n_units in job.budget.options(first)) is not stays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 0.0}, "held_out must be above 0"),
        ({"unit": "query"}, "unit must be 'group'"),
        ({"loss": "drawn"}, "'drawn' is for gradients"),
        ({"per_block": False}, "pool 'block'"),
        ({"policy": {"masks": 1}}, "masks must be a whole number from 2 up"),
        ({"policy": {"rate": 0.0}}, "rate must be above 0"),
        ({"policy": {"confidence": 1.0}}, "confidence must be in"),
        ({"policy": {"pool": "none"}}, "pool must be one of"),
        ({"policy": {"stepz": 3}}, "no key 'stepz'. Did you mean 'steps'"),
        ({"policy": {"layers": "sublayer"}}, "min_units is 0"),
        ({"policy": {"layers": "block"}, "per_block": True}, "nothing to repair or narrow"),
        ({"allocator": "fisher"}, "searches by itself"),
    ],
)
def test_recipes_that_leave_a_policy_no_say_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        _recipe(**changes)


def test_too_little_text_to_hold_any_out_is_named():
    model = tiny_model("llama")
    batches = Batches(
        batches=[{"input_ids": tiny_inputs(model)["input_ids"][:1]}], facts={"tokens": 12, "sequences": 1}
    )
    with pytest.raises(DataError, match="leaves none to hold out"):
        prune_(model, batches, _recipe())


def test_a_recipe_with_a_policy_is_plain_data():
    recipe = _recipe()
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert replace(recipe, policy=None).policy is None


def test_of_blocks_that_are_as_probable_the_criterion_drops_the_least_important() -> None:
    model = tiny_model("llama", num_hidden_layers=6)
    influence = [0.5, 0.1, 0.6, 0.05, 0.7, 0.02]
    sites = find_sites(model)
    metric = {site.key: torch.full((site.n_units,), influence[site.block], dtype=torch.float64) for site in sites}
    said = {"steps": 0, "start": "constant", "pool": "all", "layers": "block"}
    data = {"per_block": False, "sparsity": 0.45, "policy": said}
    recipe = Recipe.from_dict({**Recipe.load("osp").to_dict(), **data})
    assert recipe.policy is not None
    policy, job = recipe.policy, prepare_(model, recipe)
    loss = Objective(name="kl", batches=[tiny_inputs(model)])
    found = search(model, job, metric, policy, loss, loss, seed=0)
    dropped, _ = least_probable_blocks(job.sites, job.budget, found.scores)
    assert dropped == [3, 5]
