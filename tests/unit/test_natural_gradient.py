"""Steps of natural gradient lower the held-out divergence or leave the weights alone, and can be interrupted."""

from dataclasses import replace

import pytest
import torch

from prunelm import natural_gradient
from prunelm.data import Batches
from prunelm.errors import CalibrationError, DataError, RecipeError
from prunelm.natural_gradient import Aim, _best_length, direction
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.sensitivity import Divergence
from prunelm.stream import BlockStream
from prunelm.testing import tiny_inputs, tiny_model
from prunelm.workbench import Workbench

RECIPE = Recipe.load("obs", sparsity=0.25, multiple_of=1, samples=96, length=12, held_out=0.25, natural_steps=2)


def _calibration(model, batches=48):
    found = [tiny_inputs(model, seed=seed, padded=seed % 2 == 0) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches}, batch_tokens=24 * 12)


def _pruned(family, recipe=RECIPE, **options):
    model = tiny_model(family)
    return model, prune_(model, _calibration(model), recipe, **options)


def _said(report):
    return next(note for note in report.notes if note.startswith("natural gradient"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_steps_lower_the_divergence_on_text_that_nothing_was_fitted_to(family):
    dense = tiny_model(family)
    fresh = [tiny_inputs(dense, seed=100 + seed) for seed in range(8)]
    found = {}
    for steps in (0, 2):
        model, report = _pruned(family, replace(RECIPE, natural_steps=steps))
        aim = Divergence(BlockStream(dense, fresh), range(8))
        aim.stream = BlockStream(model, fresh)
        found[steps] = aim.measure(0, aim.stream.hidden)
    assert found[2] < found[0]
    assert "->" in _said(report)


def test_the_note_says_what_is_measured():
    model, report = _pruned("llama")
    first, last = _said(report).partition("divergence ")[2].split(" on ")[0].split(" -> ")
    dense = tiny_model("llama")
    _, held = _calibration(dense).split(RECIPE.held_out)
    aim = Divergence(BlockStream(dense, held.batches), range(len(held.batches)))
    aim.stream = BlockStream(model, held.batches)
    assert float(last) == pytest.approx(aim.measure(0, aim.stream.hidden), abs=1e-4)
    assert float(first) > float(last)


def test_dense_answers_computed_again_are_those_that_were_kept():
    model = tiny_model("llama")
    batches = [tiny_inputs(model, seed=seed, padded=True) for seed in range(2)]
    kept, again = (Divergence(BlockStream(model, batches), range(2), again=which) for which in (False, True))
    for b in range(2):
        torch.testing.assert_close(again.dense(b), kept.dense(b))
    assert again.rows == kept.rows == 40


def test_a_step_that_does_not_help_is_not_taken(monkeypatch):
    plain, _ = _pruned("llama", replace(RECIPE, natural_steps=0))
    monkeypatch.setattr(natural_gradient, "direction", lambda slope, *_: -100 * slope.double())
    model, report = _pruned("llama")
    assert "weights stay" in _said(report)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_a_step_that_only_the_tokens_like_which_lengths_are_compared_on_is_not_taken(monkeypatch):
    plain, _ = _pruned("llama", replace(RECIPE, natural_steps=0))
    own = Aim.judged
    monkeypatch.setattr(Aim, "judged", lambda aim, few=None: (own(aim, few)[0], 1.0 if few is None else 1.1))
    model, report = _pruned("llama")
    assert "weights stay" in _said(report)
    for name, weight in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_all_held_out_tokens_judge_a_step_where_they_are_one_batch():
    model = tiny_model("llama")
    one = {name: value[:1] for name, value in tiny_inputs(model).items()}
    report = prune_(model, Batches(batches=[one] * 3, facts={"tokens": 36, "sequences": 3}), RECIPE)
    assert " on 12 held-out tokens" in _said(report)


@pytest.mark.parametrize("blocks", [":", ":1"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_the_dense_model_answers_is_known_from_the_look_at_it(family, blocks, monkeypatch):
    recipe = Recipe.load("best-uniform", sparsity=0.2, multiple_of=1, samples=96, length=12, natural_steps=2)
    recipe = replace(recipe, per_block=blocks != ":", blocks=blocks)
    found, own = [], natural_gradient.aim_of

    def known(*args):
        with monkeypatch.context() as patched:
            patched.setattr(Divergence, "_through", lambda *_: pytest.fail("the dense model ran again"))
            return own(*args)

    def anew(stream, read, steps, _leaving, progress):
        return own(stream, read, steps, None, progress)

    for aim_of in (known, anew):
        monkeypatch.setattr("prunelm.pruning.aim_of", aim_of)
        found.append(_pruned(family, recipe)[0].state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=0)


def test_an_uphill_direction_is_refused_by_what_is_measured():
    measured = []

    def worse(length):
        measured.append(length)
        return 1 + length

    assert _best_length(worse, 8.0, 1.0) == (0.0, 1.0)
    assert measured == [8.0 / 2**n for n in range(natural_gradient.HALVINGS + 1)]


@pytest.mark.parametrize("least", [0.3, 1.0, 9.0])
def test_the_length_is_within_a_factor_of_two_of_the_best(least):
    length, found = _best_length(lambda length: (length / least - 1) ** 2, 1.0, 1.0)
    assert least / 2 <= length <= 2 * least
    assert found < 1


def test_direction_is_the_damped_kronecker_solve():
    torch.manual_seed(0)
    slope = torch.randn(3, 4, dtype=torch.float64)
    c, g = (torch.randn(n, 2 * n, dtype=torch.float64) for n in (4, 3))
    c, g = c @ c.T, g @ g.T
    damped = [m + m.diagonal().mean() * torch.eye(len(m), dtype=torch.float64) for m in (g, c)]
    expected = torch.linalg.solve(torch.kron(*damped), slope.flatten()).view(3, 4)
    torch.testing.assert_close(direction(slope, c, g), expected)
    assert not direction(slope, torch.zeros_like(c), g).any()


def test_an_interrupted_run_gives_the_same_weights(tmp_path, monkeypatch):
    whole, _ = _pruned("llama")
    own, calls = natural_gradient._stepped_, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*args)

    monkeypatch.setattr(natural_gradient, "_stepped_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _pruned("llama", bench=Workbench(tmp_path))
    model, _ = _pruned("llama", bench=Workbench(tmp_path))
    assert len(calls) == 3
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_gradients_that_are_not_finite_are_named(monkeypatch):
    monkeypatch.setattr(Divergence, "of_batch", _overflowing(Divergence.of_batch))
    with pytest.raises(CalibrationError, match=r"0\.\w+: its gradient is not finite"):
        _pruned("llama")


def _overflowing(own):
    return lambda self, b: own(self, b) * float("inf")


@pytest.mark.parametrize(("family", "recipe"), [("llama", "obs"), ("bert", "best-uniform")])
def test_too_little_text_to_judge_steps_is_one_line(family, recipe):
    model = tiny_model(family)
    few = Recipe.load(recipe, sparsity=0.2, multiple_of=1, natural_steps=2)
    one = {name: value[:1] for name, value in tiny_inputs(model).items()}
    with pytest.raises(DataError, match="1 calibration sequence leaves none to hold out"):
        prune_(model, Batches(batches=[one], facts={"tokens": 12, "sequences": 1}), few)


def test_steps_share_the_sequences_however_many_go_through_the_model_at_once():
    """All sequences in one batch, and one more step than there are sequences to fit."""
    model = tiny_model("llama")
    whole = Batches(
        batches=[{"input_ids": torch.cat([tiny_inputs(model, seed=seed)["input_ids"] for seed in range(2)])}],
        facts={"tokens": 48, "sequences": 4},
    )
    fit, held = whole.split(0.25)
    parts = [batch["input_ids"] for batch in fit.at_least(2).batches]
    assert [len(part) for part in [*parts, held.batches[0]["input_ids"]]] == [1, 1, 1, 1]
    assert torch.equal(torch.cat(parts), fit.batches[0]["input_ids"])
    said = _said(prune_(model, whole, replace(RECIPE, natural_steps=4)))
    assert said.endswith("of 3 steps, the text having no more sequences to fit than 3") or "no step lowers" in said


def test_both_passes_of_the_steps_show_how_far_they_are():
    told = []
    _pruned("llama", progress=lambda *one: told.append(one))
    for stage in ("dense answers", "natural gradient"):
        done = [one[1] for one in told if one[0] == stage]
        total = next(one[2] for one in told if one[0] == stage)
        assert done == list(range(1, total + 1))


def test_steps_towards_a_model_without_hidden_channels_say_so():
    _, report = _pruned("llama", replace(RECIPE, hidden=0.25, sparsity=0.35))
    assert _said(report).endswith("from the model without its hidden channels")


def test_half_precision_takes_steps_that_it_could_not_write_down(monkeypatch):
    own = natural_gradient.direction
    monkeypatch.setattr(natural_gradient, "direction", lambda *args: 1e9 * own(*args))
    model = tiny_model("llama").half()
    report = prune_(model, _calibration(model), RECIPE)
    assert "->" in _said(report)


def test_steps_need_held_out_tokens():
    with pytest.raises(RecipeError, match="held_out must be above 0"):
        replace(RECIPE, held_out=0.0)
