"""Which units a smaller model has."""

from itertools import combinations

import pytest
import torch

from prunelm.ascending import ascending
from prunelm.errors import CheckpointError
from prunelm.matching import check_family, check_planned, matched_units, planned_units
from prunelm.sites import find_sites, gone_sites, narrow_, weight_of
from prunelm.testing import tiny_model


def _pruned(family, kept, unit="group", **options):
    """A tiny model with some units of some sites."""
    model = tiny_model(family, **options)
    for key, units in kept.items():
        site = next(s for s in find_sites(model, unit) if s.key == key)
        narrow_(site, torch.tensor(units, dtype=torch.long))
    return model


def _all_but(model, key, *gone):
    units = next(s for s in find_sites(model) if s.key == key).n_units
    return [unit for unit in range(units) if unit not in gone]


def _plan(model, kept, reconstruction="none", unit="group"):
    sites = {s.key: s for s in find_sites(model, unit)}
    entries = {key: {"units": sites[key].n_units, "kept": list(units)} for key, units in kept.items()}
    return {"format": 1, "recipe": {"unit": unit, "reconstruction": reconstruction}, "sites": entries}


def _checked(plan, dense, pruned):
    check_family(dense, pruned)
    return check_planned(plan, *planned_units(plan, dense), dense, pruned)


def _by_trying(cost):
    """The least total of ascending columns, by all of them."""
    few, many = cost.shape
    return min(
        (sum(float(cost[i, j]) for i, j in enumerate(chosen)), chosen) for chosen in combinations(range(many), few)
    )


def test_named_units_may_be_rounded_to_eight_bits():
    dense = tiny_model("llama")
    kept = {"0.ffn": _all_but(dense, "0.ffn", 3, 8)}
    pruned = _pruned("llama", kept)
    with torch.no_grad():
        for weight in pruned.parameters():
            weight.copy_(weight.to(torch.float8_e4m3fn))
    assert _checked(_plan(dense, kept), dense, pruned) == []


@pytest.mark.parametrize("seed", range(8))
def test_ascending_columns_cost_least(seed):
    cost = torch.rand(4, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if seed % 2:
        cost = (cost * 3).round()
    total, chosen = _by_trying(cost)
    found = ascending(cost)
    assert (found.diff() > 0).all()
    assert float(cost.gather(1, found[:, None]).sum()) == pytest.approx(total)
    if seed % 2 == 0:
        assert tuple(found.tolist()) == chosen
    assert ascending(torch.zeros(3, 5)).tolist() == [0, 1, 2]
    assert ascending(torch.zeros(0, 5)).tolist() == []
    assert ascending(torch.rand(3, 3)).tolist() == [0, 1, 2]


def test_units_with_equal_rows_are_told_by_their_order_and_columns():
    dense = tiny_model("llama")
    for site in [s for s in find_sites(dense) if s.name == "ffn"]:
        for slot in site.producers:
            weight_of(slot.layer).data[[3, 5, 9]] = 0
            weight_of(slot.layer).data[11] = weight_of(slot.layer).data[2]
    kept = {"0.ffn": _all_but(dense, "0.ffn", 3, 7), "1.ffn": _all_but(dense, "1.ffn", 2, 5, 20)}
    pruned = tiny_model("llama")
    pruned.load_state_dict(dense.state_dict())
    for key, units in kept.items():
        site = next(s for s in find_sites(pruned) if s.key == key)
        narrow_(site, torch.tensor(units))
        column = weight_of(site.consumer.layer).data
        column += 0.02 * torch.randn_like(column)
    found, unit = matched_units(dense, pruned)
    assert unit == "group"
    assert {key: found[key].tolist() for key in kept} == kept


@pytest.mark.parametrize("unit", ["group", "query"])
def test_units_are_found_in_their_order(unit):
    dense = tiny_model("llama")
    kept = {"1.attention": [1, 2, 5]} if unit == "query" else {"1.attention": [1]}
    sizes = {s.key: s.n_units for s in find_sites(dense, unit)}
    pruned = _pruned("llama", {**kept, "0.ffn": range(2, sizes["0.ffn"])}, unit)
    found, kind = matched_units(dense, pruned)
    assert kind == unit
    assert found["1.attention"].tolist() == kept["1.attention"]
    assert found["0.ffn"].tolist() == list(range(2, sizes["0.ffn"]))
    assert found["1.ffn"].tolist() == list(range(sizes["1.ffn"]))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_one_query_head_of_each_group_is_found(family):
    dense, kept = tiny_model(family), {"0.attention": [1, 2, 5], "1.attention": [0, 3, 4]}
    pruned = _pruned(family, kept, "query")
    found, unit = matched_units(dense, pruned)
    assert unit == "query"
    assert {key: found[key].tolist() for key in kept} == kept
    plan = _plan(dense, kept, unit="query")
    assert _checked(plan, dense, pruned) == []
    with pytest.raises(CheckpointError, match=r"0\.attention: pruning.json says that unit"):
        _checked(plan, tiny_model(family, seed=7), pruned)


def test_what_is_said_is_of_the_units_that_fit():
    """One group of the other model is no matter of query heads, and differing query heads are no matter of groups."""
    with pytest.raises(CheckpointError, match=r"0\.attention: unit \d is like no unit of the dense model"):
        matched_units(tiny_model("llama"), _pruned("llama", {"0.attention": [1, 2]}, seed=7))
    uneven = _pruned("llama", {"0.attention": [1, 2, 5]}, "query")
    site = next(s for s in find_sites(uneven) if s.name == "attention")
    narrow_(site, torch.tensor([0, 2]))
    with pytest.raises(CheckpointError, match="not the same number of query heads is left in every group"):
        matched_units(tiny_model("llama"), uneven)
    with pytest.raises(CheckpointError, match=r"0\.attention: its units have another shape"):
        matched_units(tiny_model("llama"), tiny_model("llama", hidden_size=96))


def test_sites_without_units_are_found_to_be_gone():
    dense, pruned = tiny_model("llama"), _pruned("llama", {"1.ffn": []})
    assert gone_sites(pruned)
    check_family(dense, pruned)
    found, _ = matched_units(dense, pruned)
    assert len(found["1.ffn"]) == 0


@pytest.mark.parametrize(
    ("dense", "pruned", "says"),
    [
        ("gpt2", "llama", "the dense one is gpt2, the pruned one llama"),
        ("qwen3", "llama", "the dense one is qwen3, the pruned one llama"),
        ("mistral", "llama", "the dense one is mistral, the pruned one llama"),
        ("bert", "gpt2", "the dense one is bert, the pruned one gpt2"),
    ],
)
def test_another_family_is_refused(dense, pruned, says):
    with pytest.raises(CheckpointError, match=says):
        check_family(tiny_model(dense), tiny_model(pruned))


@pytest.mark.parametrize(("dense", "pruned"), [("llama", "mistral"), ("llama", "granite"), ("qwen2", "llama")])
def test_a_relabeled_model_is_of_the_family(dense, pruned):
    check_family(tiny_model(dense), tiny_model(pruned))


def test_other_depths_and_sites_are_named():
    with pytest.raises(CheckpointError, match="the dense one has 3 blocks, the pruned one 2"):
        check_family(tiny_model("llama", num_hidden_layers=3), tiny_model("llama"))
    with pytest.raises(CheckpointError, match=r"the pruned one has 1\.ffn, the dense one has not"):
        check_family(_pruned("llama", {"1.ffn": []}), tiny_model("llama"))


def test_the_units_that_a_plan_names_are_compared():
    dense = tiny_model("llama")
    kept = {"0.ffn": _all_but(dense, "0.ffn", 4), "1.attention": [1]}
    pruned, plan = _pruned("llama", kept), _plan(dense, kept)
    assert _checked(plan, dense, pruned) == []
    with pytest.raises(CheckpointError, match=r"0\.attention: pruning.json says that unit \d is unit \d of the dense"):
        _checked(plan, tiny_model("llama", seed=7), pruned)
    shifted = _plan(dense, {**kept, "0.ffn": _all_but(dense, "0.ffn", 9)})
    with pytest.raises(CheckpointError, match=r"0\.ffn: pruning.json says that unit \d is unit \d of the dense"):
        _checked(shifted, dense, pruned)
    fewer = _plan(dense, {**kept, "0.ffn": _all_but(dense, "0.ffn", 4, 9)})
    with pytest.raises(CheckpointError, match=r"units of 0\.ffn stay, and the pruned model has"):
        _checked(fewer, dense, pruned)


def test_where_producers_were_refitted_the_embeddings_are_compared():
    dense = tiny_model("llama")
    kept = {"0.ffn": _all_but(dense, "0.ffn", 4)}
    pruned, plan = _pruned("llama", kept), _plan(dense, kept, "two-step")
    for slot in find_sites(pruned)[0].producers:
        weight_of(slot.layer).data.mul_(1.5)
    assert "only its embeddings could be compared" in _checked(plan, dense, pruned)[0]
    with pytest.raises(CheckpointError, match="the embeddings of the pruned model are not those of the dense"):
        _checked(plan, tiny_model("llama", seed=7), pruned)


def test_a_model_without_its_head_is_compared():
    dense, pruned = tiny_model("llama"), _pruned("llama", {"0.ffn": range(1, 20)}, model_class="LlamaModel")
    with pytest.raises(CheckpointError, match="like no unit of the dense model"):
        matched_units(tiny_model("llama", seed=7), pruned)
    with torch.no_grad():
        for name, parameter in tiny_model("llama").model.named_parameters():
            target = pruned.get_parameter(name)
            if target.shape == parameter.shape:
                target.copy_(parameter)
            elif "mlp.down" in name:
                target.copy_(parameter[:, 1:20])
            else:
                target.copy_(parameter[1:20])
    assert matched_units(dense, pruned)[0]["0.ffn"].tolist() == list(range(1, 20))
