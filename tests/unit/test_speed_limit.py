"""A factor of speed is met by what was timed; here the time of a model is that of its weights, so nothing is noisy."""

import pytest
import torch

from prunelm import layer_times, speed_limit
from prunelm.allocation import Outlook
from prunelm.errors import BudgetError
from prunelm.limits import limit_of
from prunelm.loading import find_model, skeleton
from prunelm.progress import silent
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.sized_pruning import as_before
from prunelm.survey import Survey
from prunelm.workbench import Workbench

HEADS, CHANNELS, REST = 4e-3, 1e-3, 20e-3


@pytest.fixture
def clocked(monkeypatch, tmp_path):
    """Runs take the seconds of their units: attention is dear, and the last third of the channels costs nothing."""

    def seconds(model, _limit):
        total = REST
        for site in find_sites(model):
            total += HEADS * site.n_units if site.name == "attention" else CHANNELS * min(site.n_units, 30)
        calls.append(total)
        return total

    calls = []
    monkeypatch.setattr(layer_times, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(layer_times, "run_seconds", seconds)
    monkeypatch.setattr(speed_limit, "run_seconds", seconds)
    return calls


def of(tiny_folder, factor, recipe, outlook=None):
    source = find_model(tiny_folder("llama"))
    return source, speed_limit.sped(limit_of(speedup=factor), source, recipe, outlook, silent)


def test_the_factor_is_met_and_the_table_is_kept(clocked, tiny_folder, tmp_path):
    recipe = Recipe.load("l1", multiple_of=1)
    source, size = of(tiny_folder, 1.3, recipe)
    assert size.asked["measured"] == pytest.approx(1.3, rel=0.02)
    whole = skeleton(source)
    model = layer_times.stand_in(source, size.decided.counts, "group")
    ratio = layer_times.run_seconds(whole, None) / layer_times.run_seconds(model, None)
    assert ratio == pytest.approx(size.asked["measured"])
    assert len({size.decided.counts["0.ffn"], size.decided.counts["1.ffn"]}) == 1
    assert 0 < size.recipe.sparsity < 1
    (kept,) = (tmp_path / "cache" / "prunelm").iterdir()
    assert kept.name == size.asked["layer_times"]
    before = len(clocked)
    assert of(tiny_folder, 1.3, recipe)[1].decided.counts == size.decided.counts
    assert len(clocked) - before < before
    kept.write_text("{")
    assert of(tiny_folder, 1.3, recipe)[1].decided.counts == size.decided.counts


def test_damage_is_weighed_against_time(clocked, tiny_folder):
    """Attention of block 0 and channels of block 1 are cheap to lose; the plan takes them, not the least parameters."""
    recipe = Recipe.load("sensitivity", allocator="error-curve", multiple_of=1)
    sites = find_sites(skeleton(find_model(tiny_folder("llama"))))
    price = {"0.attention": 0.001, "1.ffn": 0.01}
    curves = {s.key: torch.linspace(0, price.get(s.key, 1.0), s.n_units + 1, dtype=torch.float64) for s in sites}
    outlook = Outlook(survey=Survey(scores={s.key: torch.ones(s.n_units) for s in sites}, curves=curves))
    _, size = of(tiny_folder, 1.25, recipe, outlook)
    assert size.asked["measured"] == pytest.approx(1.25, rel=0.03)
    assert size.decided.counts["0.attention"] == 1
    assert size.decided.counts["1.attention"] == 3
    assert size.decided.counts["0.ffn"] == 40


def test_more_than_the_units_can_save(clocked, tiny_folder):
    with pytest.raises(BudgetError, match=r"--speedup 20: the narrowest sites save .* ms of a run"):
        of(tiny_folder, 20, Recipe.load("l1", multiple_of=1))


def test_a_recipe_that_looks_is_not_sized_before(clocked, tiny_folder):
    _, size = of(tiny_folder, 1.3, Recipe.load("sensitivity"))
    assert size.decided is None
    assert not clocked


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "bert"])
def test_models_of_which_only_the_time_matters_run(name, tiny_folder):
    source = find_model(tiny_folder(name))
    counts = {site.key: site.n_units - 1 for site in find_sites(skeleton(source))}
    model = layer_times.stand_in(source, counts, "group", 1)
    assert {site.key: site.n_units for site in find_sites(model)} == {k: n for k, n in counts.items() if k[0] == "0"}
    assert layer_times.run_seconds(model, limit_of(speedup="1.5@16x2")) > 0
    if name != "bert":
        assert layer_times.run_seconds(model, limit_of(speedup="1.5@decode")) > 0


def test_an_interrupted_run_goes_on_with_the_size_it_was_begun_with(clocked, tiny_folder, tmp_path):
    bench, recipe = Workbench(tmp_path), Recipe.load("l1", multiple_of=1)
    first = as_before(bench, lambda: of(tiny_folder, 1.3, recipe)[1])
    again = as_before(bench, lambda: pytest.fail("measured again"))
    assert again == first
    assert first.decided is not None
    assert as_before(Workbench(), lambda: first) == first


def test_times_of_another_data_type_are_kept_apart(clocked, tiny_folder, monkeypatch):
    recipe = Recipe.load("l1", multiple_of=1)
    names = {of(tiny_folder, 1.3, recipe)[1].asked["layer_times"]}
    monkeypatch.setattr(layer_times, "_dtype", lambda _source: torch.bfloat16)
    names.add(of(tiny_folder, 1.3, recipe)[1].asked["layer_times"])
    assert len(names) == 2
