"""Recipes are data: every shipped one loads, travels through JSON unchanged, and every mistake in one is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from prunelm.errors import BudgetError, PruneLMError, RecipeError, UnknownPluginError
from prunelm.recipe import Recipe, Scoring, recipe_names, recipe_summaries

SHIPPED = (
    "aef",
    "best",
    "best-uniform",
    "flap",
    "goa",
    "goa-budget",
    "goa-data-free",
    "hywia",
    "l1",
    "l2",
    "liar",
    "obs",
    "osp",
    "osp-repaired",
    "random",
    "sensitivity",
    "taylor-first",
    "taylor-second",
    "taylor-vector",
    "wanda-sp",
)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_travel_through_json(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert set(recipe.to_dict()) == {field.name for field in dataclasses.fields(Recipe)}


def test_every_shipped_recipe_is_known_and_summed_up() -> None:
    assert recipe_names() == sorted(SHIPPED)
    assert [name for name, _, _ in recipe_summaries()] == sorted(SHIPPED)
    for _, line, origin in recipe_summaries():
        assert len(line) > 20
        assert not line.startswith("#")
        assert origin == "prunelm"


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("goa", True),
        ("goa-budget", True),
        ("goa-data-free", True),
        ("wanda-sp", True),
        ("l1", False),
        ("l2", False),
        ("random", False),
    ],
)
def test_which_recipes_read_text(name: str, reads: bool) -> None:
    assert Recipe.load(name).reads_text is reads


def test_what_makes_a_recipe_read_text() -> None:
    blind = Scoring(criterion="second-moment", options={"form": "identity"})
    assert not Recipe(attention=blind, ffn=blind).reads_text
    assert Recipe(attention=blind, ffn=Scoring(criterion="second-moment")).reads_text
    assert not Recipe(attention=blind, ffn=Scoring(criterion="wanda-sp"), sites=("attention",)).reads_text
    assert Recipe(attention=blind, ffn=blind, reconstruction="two-step").reads_text


def test_goa_as_printed_and_as_repaired() -> None:
    printed, repaired = Recipe.load("goa"), Recipe.load("goa-budget")
    assert printed.attention.options["rule"] == "printed"
    assert repaired.attention.options["rule"] == "repaired"
    assert printed.allocator == "per-module"
    assert repaired.allocator == "uniform"
    assert (printed.per_block, repaired.per_block) == (True, False)
    assert printed.reconstruction == repaired.reconstruction == "two-step"
    assert Recipe.load("goa-data-free").calibration == "self-generated"
    assert Recipe.load("goa-data-free").covariance_text == "random-tokens"


# Replacing values.


def test_overrides_replace_and_none_does_not() -> None:
    recipe = Recipe.load("l1", sparsity=0.3, samples=None, sites=["ffn"], blocks="1:")
    assert recipe.sparsity == 0.3
    assert recipe.samples == Recipe.load("l1").samples
    assert recipe.sites == ("ffn",)
    assert recipe.blocks == "1:"


def test_a_criterion_replaces_both_and_clears_their_options() -> None:
    recipe = Recipe.load("goa-budget", criterion="l2")
    assert recipe.attention == recipe.ffn == Scoring(criterion="l2")
    assert recipe.reconstruction == "two-step"


def test_scoring_of_a_kind_of_site() -> None:
    recipe = Recipe.load("goa-budget")
    assert recipe.scoring("attention") == recipe.attention
    assert recipe.scoring("ffn") == recipe.ffn
    assert recipe.attention != recipe.ffn


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().sparsity = 0.5  # type: ignore[misc]


# Files.


def test_a_file_is_named_by_its_stem_or_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('sparsity = 0.4\n[ffn]\ncriterion = "second-moment"\nform = "gaussian"\n')
    recipe = Recipe.load(path)
    assert recipe.name == "mine"
    assert recipe.sparsity == 0.4
    assert recipe.ffn == Scoring(criterion="second-moment", options={"form": "gaussian"})
    assert recipe.attention == Recipe().attention
    path.write_text('name = "other"\n')
    assert Recipe.load(str(path)).name == "other"


def test_what_is_not_said_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "custom.toml"
    path.write_text("")
    assert Recipe.load(path) == Recipe()


def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(RecipeError, match=r"no recipe file '.*mine\.toml'"):
        Recipe.load(path)
    path.write_text("sparsity = = 0.4")
    with pytest.raises(RecipeError, match=r"mine\.toml: not valid TOML: .*line 1"):
        Recipe.load(path)
    path.write_text("sparsty = 0.4")
    with pytest.raises(RecipeError, match=r"mine\.toml.*: unknown key 'sparsty'. Did you mean 'sparsity'\? Known: all"):
        Recipe.load(path)
    path.write_text("ffn = 3")
    with pytest.raises(RecipeError, match=r"mine\.toml.*: \[ffn\] must be a table with a criterion, got 3"):
        Recipe.load(path)


def test_a_word_far_from_all_gets_no_guess() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load("qqqq")
    assert "Did you mean" not in str(caught.value)
    assert "goa-budget" in str(caught.value)
    assert isinstance(caught.value, PruneLMError)


# Values.


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"sparsity": 0.0}, BudgetError, "sparsity 0 removes nothing"),
        ({"sparsity": 1.0}, BudgetError, "got 1.0"),
        ({"sparsity": -0.5}, BudgetError, "got -0.5"),
        ({"sparsity": float("nan")}, BudgetError, "got nan"),
        ({"of": "model "}, RecipeError, "of must be one of blocks, model, got 'model '. Did you mean 'model'"),
        ({"unit": "head"}, RecipeError, "unit must be one of group, query"),
        ({"order": "random"}, RecipeError, "order must be one of sequential, one-shot"),
        ({"calibration": "none"}, RecipeError, "calibration must be one of text, self-generated"),
        ({"samples": 0}, RecipeError, "samples must be at least 1, got 0"),
        ({"length": 7}, RecipeError, "length must be at least 8, got 7"),
        ({"min_units": -1}, RecipeError, "min_units must be at least 0, got -1"),
        ({"similarity_sequences": 0}, RecipeError, "similarity_sequences must be at least 1"),
        ({"similarity_rows": -1}, RecipeError, "similarity_rows must be at least 0"),
        ({"similarity_skip": -1}, RecipeError, "similarity_skip must be at least 0"),
        ({"ridge": -0.1}, RecipeError, "ridge must be a number from 0 up, got -0.1"),
        ({"ridge": float("inf")}, RecipeError, "ridge must be a number from 0 up, got inf"),
        ({"attention_share": float("nan")}, RecipeError, "attention_share must be a number from 0 up, got nan"),
        ({"sites": ()}, RecipeError, "sites must be attention, ffn or both, got none"),
        ({"sites": ("ffn", "mlp")}, RecipeError, "sites must be attention, ffn or both, got ffn, mlp"),
        ({"order": "one-shot", "reconstruction": "two-step"}, RecipeError, "order 'one-shot' sees no drift"),
        ({"allocator": "equal"}, UnknownPluginError, "unknown allocator 'equal'"),
        ({"reconstruction": "one-step"}, UnknownPluginError, "Did you mean 'two-step'"),
        ({"ffn": Scoring(criterion="l3")}, UnknownPluginError, "unknown criterion 'l3'. Did you mean 'l"),
        ({"attention": Scoring(criterion="l1", options={"p": 1})}, RecipeError, "'l1' has no option 'p'. It has no"),
        ({"blocks": "4"}, RecipeError, "blocks must be a range like '4:-2' or ':', got '4'"),
        ({"blocks": ""}, RecipeError, "got ''"),
        ({"blocks": "a:b"}, RecipeError, "got 'a:b'"),
        ({"blocks": "1:4:2"}, RecipeError, "got '1:4:2'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_values_that_are_wrong(values: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error) as caught:
        Recipe(**values)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_known_by_name_and_type() -> None:
    with pytest.raises(RecipeError, match=r"no option 'frm'. Did you mean 'form'\? Known: form, gated"):
        Recipe(ffn=Scoring(criterion="second-moment", options={"frm": "exact"}))
    with pytest.raises(RecipeError, match="'head-similarity': tau must be a number, got True"):
        Recipe(attention=Scoring(criterion="head-similarity", options={"tau": True}))


def test_a_whole_number_is_a_number(without_type_checks: None) -> None:
    whole = Recipe(attention=Scoring(criterion="head-similarity", options={"tau": 1}), ridge=1)
    assert whole.attention.options["tau"] == 1


@pytest.mark.parametrize("form", ["exact", "gaussian", "identity", "exakt"])
@pytest.mark.parametrize("criterion", ["second-moment", "head-similarity"])
def test_a_form_is_checked_before_any_work(criterion: str, form: str) -> None:
    scoring = Scoring(criterion=criterion, options={"form": form})
    if form != "exakt":
        assert Recipe(attention=scoring).attention == scoring
        return
    with pytest.raises(RecipeError, match=r"form must be one of exact, gaussian, identity, got 'exakt'"):
        Recipe(attention=scoring)


# Blocks.


@pytest.mark.parametrize(
    ("blocks", "n", "expected"),
    [
        (":", 5, [0, 1, 2, 3, 4]),
        ("1:", 5, [1, 2, 3, 4]),
        (":-1", 5, [0, 1, 2, 3]),
        ("1:-2", 5, [1, 2]),
        (" 1 : 3 ", 5, [1, 2]),
        ("-2:", 5, [3, 4]),
        ("3:3", 5, []),
        ("7:9", 5, []),
        ("0:99", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_block_range(blocks: str, n: int, expected: list[int]) -> None:
    assert list(Recipe(blocks=blocks).block_range(n)) == expected


def test_block_range_of_small_models_is_everything() -> None:
    recipe = Recipe.load("goa")
    assert list(recipe.block_range(23)) == list(range(23))
    assert list(recipe.block_range(24)) == list(range(4, 22))
    assert list(recipe.block_range(32)) == list(range(4, 30))


def test_an_evened_recipe_gives_equal_widths():
    evened = Recipe.load("best").evened()
    assert dataclasses.replace(evened, name="best-uniform") == Recipe.load("best-uniform")
    narrow = Recipe.load("best").evened(("ffn",))
    assert dataclasses.replace(narrow, name="best-uniform") == Recipe.load("best-uniform", sites=["ffn"])
    assert Recipe.load("flap").evened().held_out > 0
    assert Recipe.load("obs").evened() == Recipe.load("obs")


def test_shares_of_attention_go_with_allocators_that_divide_by_shares() -> None:
    for name, share in (("obs", 0.5), ("goa", 0.0), ("best", 0.0)):
        assert Recipe.load(name, attention_share=share).attention_share == share


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rounds": -1}, "rounds must be at least 0"),
        ({"recipe": "obs", "rounds": 3}, "rounds refine widths that differ between blocks"),
        ({"held_out": 0.0}, "held_out must be above 0"),
        ({"recipe": "obs", "exchanges": 5, "held_out": 0.0}, "exchanges lower the error that a repair leaves"),
        ({"recipe": "obs", "choose_share": True, "dense_share": 0.5}, "takes no dense_share, which is 0.5"),
        ({"recipe": "wanda-sp", "choose_share": True, "held_out": 0.1}, "choose_share chooses the target of a repair"),
        ({"recipe": "obs", "choose_share": True, "order": "one-shot"}, "sees no drift"),
        ({"fisher_tokens": 0}, "fisher_tokens must be at least 1"),
        (
            {"attention_share": 0.5},
            "attention_share 0.5 cannot be kept: allocator 'fisher' finds out what attention loses",
        ),
        ({"recipe": "best-uniform", "attention_share": 0.0}, r"'split' .* --sites ffn, or .* --allocator uniform"),
        ({"recipe": "flap", "attention_share": 2.0}, "attention_share 2 cannot be kept: allocator 'global'"),
        ({"recipe": "osp", "attention_share": 0.5}, "cannot be kept: a policy over all units"),
        ({"ffn": {"criterion": "obs", "metric": "loss"}}, "metric must be module or output, got 'loss'"),
        ({"ffn": {"criterion": "obs", "shrink": 2.0}}, r"shrink must be in \[0, 1\], got 2.0"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes, says):
    name = changes.pop("recipe", "best")
    with pytest.raises(RecipeError, match=says):
        Recipe.load(name, **changes)
