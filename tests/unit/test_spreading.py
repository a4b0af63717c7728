"""Models spread over devices: accelerate's hooks are on every block while it is pruned, and all are gone afterwards."""

import pytest
import torch

import prunelm
from prunelm.data import Batches
from prunelm.errors import DeviceError
from prunelm.placement import find_device, spreads
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.spreading import gathered, spread
from prunelm.testing import tiny_inputs, tiny_model
from prunelm.workflow import one_size

PLACES = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
SMALL = {"sparsity": 0.3, "multiple_of": 1, "price_tokens": 96}


def pruned(recipe, *, hooked):
    model = tiny_model("llama")
    if hooked:
        model = spread(model, dict.fromkeys(PLACES, "cpu"))
    batches = [tiny_inputs(model, seed=seed) for seed in range(40)]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    calibration = Batches(batches=batches, facts={"tokens": tokens, "sequences": 80})
    if recipe.policy is not None:
        recipe = Recipe.from_dict({**recipe.to_dict(), "policy": {**vars(recipe.policy), "steps": 4, "save_every": 2}})
    prune_(model, calibration, recipe)
    return model


EVERY_DAY = ("goa-budget", "obs", "osp")


@pytest.mark.parametrize(
    "name", [*EVERY_DAY, *(pytest.param(n, marks=pytest.mark.slow) for n in ("goa", "best", "hywia", "flap"))]
)
def test_hooks_change_nothing_and_stay_until_the_end(name):
    changes = {"rounds": 1} if name == "best" else {}
    recipe = Recipe.load(name, **SMALL, **changes)
    plain, hooked = pruned(recipe, hooked=False), pruned(recipe, hooked=True)
    blocks = hooked.model.layers
    assert all(hasattr(block, "_hf_hook") and block._hf_hook.execution_device == "cpu" for block in blocks)
    assert all("forward" in vars(block) for block in blocks)
    hooked = gathered(hooked)
    assert not any(hasattr(module, "_hf_hook") for module in hooked.modules())
    assert not hasattr(hooked, "hf_device_map")
    own, other = plain.state_dict(), hooked.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[key], other[key]) for key in own)


@pytest.fixture
def two_gpus(monkeypatch):
    """A machine that seems to have two GPUs, with so many bytes free on each."""

    def seem(free):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _i: (free, free))

    return seem


def test_what_auto_means(two_gpus, monkeypatch):
    assert (find_device("auto"), spreads("auto")) == (find_device(), False)
    two_gpus(1)
    assert (find_device("auto").type, spreads("auto"), spreads(None)) == ("cuda", True, False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (find_device("auto"), spreads("auto")) == (torch.device("cuda:1"), False)


def test_whole_blocks_are_divided_evenly(two_gpus, monkeypatch):
    two_gpus(10**9)
    given = {}
    monkeypatch.setattr("prunelm.spreading.dispatch_model", lambda model, places, **_: given.update(places) or model)
    spread(tiny_model("llama", num_hidden_layers=8, vocab_size=32))
    blocks = [given[f"model.layers.{i}"] for i in range(8)]
    assert blocks == sorted(blocks)
    assert 3 <= blocks.count(0) <= 5
    assert set(blocks) == {0, 1}


def test_too_little_is_said_with_numbers(two_gpus):
    two_gpus(1000)
    with pytest.raises(DeviceError, match=r"--device auto: the weights need [\d,]+ bytes, and 2 GPUs have 1,400 for"):
        spread(tiny_model("llama"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"stream": True, "recipe": "obs"}, "--stream holds one block on one device"),
        ({"recipe": "liar", "hidden": 0.25, "per_block": True}, "--device auto has them on several GPUs"),
    ],
)
def test_what_does_not_go_with_several(options, says, two_gpus, tiny_folder, text_file, tmp_path):
    two_gpus(10**9)
    with pytest.raises(prunelm.PruneLMError, match=says):
        one_size.prune(tiny_folder("llama"), tmp_path / "out", text=text_file, device="auto", **options)
    assert list(tmp_path.iterdir()) == []
