import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import forked

from prunelm import testing
from prunelm.architectures import ARCHITECTURES, lookup
from prunelm.checkpoint import save
from prunelm.data import Batches
from prunelm.errors import ArchitectureError, BudgetError, RecipeError, UnsupportedModelError
from prunelm.family import prune_family
from prunelm.hidden import find_hidden, narrow_hidden_
from prunelm.hidden_repair import narrow_and_repair_hidden_
from prunelm.hidden_scores import reader_energy, reader_magnitude
from prunelm.loading import load, narrow_to_, widths
from prunelm.plan import prunable
from prunelm.progress import silent
from prunelm.pruning import prune_
from prunelm.recipe import Recipe
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.sites import bias_of, find_sites, weight_of
from prunelm.stream import BlockStream
from prunelm.testing import TINY, check_hidden, outputs, tiny_inputs, tiny_model
from prunelm.workflow.calibrating import calibrate
from prunelm.workflow.several_sizes import prune_sizes

STOCK = ("llama", "mistral", "qwen2", "qwen3", "phi3")
CASES = [(name, "per-block") for name in sorted(TINY)] + [(name, "uniform") for name in STOCK]

VARIANTS = [
    ("gpt_neox", {"use_parallel_residual": False}),
    ("opt", {"do_layer_norm_before": False}),
    ("opt", {"layer_norm_elementwise_affine": False}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"vocab_size": 48}),
    ("gpt2", {"n_inner": 56}),
    ("bert", {"model_class": "BertForMaskedLM"}),
    ("bert", {"model_class": "BertForSequenceClassification", "num_labels": 48}),
    ("gpt2", {"model_class": "GPT2ForSequenceClassification", "pad_token_id": 0}),
    ("llama", {"model_class": "LlamaForSequenceClassification"}),
]


@pytest.mark.parametrize("name", sorted(TINY))
def test_removing_hidden_channels_equals_silencing_them(name):
    check_hidden(lambda: tiny_model(name))


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_variants_of_families(name, overrides):
    build = lambda: tiny_model(name, **overrides)  # noqa: E731
    check_hidden(build, inputs=tiny_inputs(build(), padded=name == "bert"))


def calibration(model, batches=16):
    found = [tiny_inputs(model, seed=seed) for seed in range(batches)]
    return Batches(batches=found, facts={"tokens": batches * 24, "sequences": 2 * batches})


def recipe(**overrides):
    usual = {"sparsity": 0.5, "multiple_of": 1, "hidden": 0.25, "samples": 16, "length": 12}
    return Recipe.load("liar", **{**usual, **overrides})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Narrowed and repaired models in memory, and what a fresh process reads from their folders."""
    root = tmp_path_factory.mktemp("folders")
    models = {}
    for name, mode in CASES:
        model = tiny_model(name, num_hidden_layers=3)
        report = prune_(model, calibration(model), recipe(per_block=mode == "per-block"))
        save(model, report, root / f"{name}-{mode}", prove=False)
        models[name, mode] = model
    script = Path(__file__).parents[1] / "conformance" / "load_folders.py"
    ran = forked.run(str(script), str(root))
    assert ran.returncode == 0, ran.stderr[-2000:]
    return root, models, load_file(root / "found.safetensors")


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_fresh_process_computes_the_same(folders, name, mode):
    root, models, found = folders
    model = models[name, mode]
    ids = torch.arange(3, 15)[None]
    assert (found[f"{name}-{mode}.logits"] - outputs(model, {"input_ids": ids})).abs().max() < 1e-4
    if model.can_generate():
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False
        )
        assert torch.equal(found[f"{name}-{mode}.tokens"], tokens)
    if model.get_output_embeddings() is not None:
        assert bool(found[f"{name}-{mode}.tied"])
    facts = json.loads((root / f"{name}-{mode}" / "pruning.json").read_text())
    assert facts["loader"] == ("transformers" if mode == "uniform" else "prunelm")
    assert facts["widths"]["hidden"] == {"units": 36}
    assert len(facts["hidden"]["kept"]) == 36


def narrowed(name, *, ridge=1e-8, held=(), reconstruction="least-squares", batches=8, **overrides):
    """A model repaired behind narrowed channels, its dense twin, the channels kept, the batches, and the report."""
    model, dense = tiny_model(name, **overrides), tiny_model(name, **overrides)
    width = find_hidden(model).width
    kept = torch.randperm(width, generator=torch.Generator().manual_seed(3))[:36].sort().values
    fed = [tiny_inputs(model, seed=seed, padded=name == "bert") for seed in range(batches)]
    report = narrow_and_repair_hidden_(
        model,
        kept,
        fed,
        range(batches),
        held,
        reconstruction=RECONSTRUCTIONS[reconstruction],
        ridge=ridge,
        progress=silent,
    )
    return model, dense, kept, fed, report


def inputs_of(model, fed, path):
    """What a layer is given, one row per real token."""
    rows = []

    def see(_module, args):
        rows.append(args[0][mask])

    handle = model.get_submodule(path).register_forward_pre_hook(see)
    for batch in fed:
        mask = batch["attention_mask"].bool()
        outputs(model, batch)
    handle.remove()
    return torch.cat(rows).double()


READERS = [
    ("llama", "model.layers.1.self_attn.q_proj", {}),
    ("llama", "model.layers.1.mlp.up_proj", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "lm_head", {"tie_word_embeddings": False}),
    ("gpt2", "transformer.h.1.attn.c_attn", {}),
    ("bert", "bert.encoder.layer.1.intermediate.dense", {"model_class": "BertForSequenceClassification"}),
    ("bert", "cls.predictions.transform.dense", {"model_class": "BertForMaskedLM"}),
]


@pytest.mark.parametrize(("name", "path", "overrides"), READERS)
def test_a_repaired_reader_is_the_least_squares_solution_on_its_real_inputs(name, path, overrides):
    """Inputs are those of the finished model: what comes before a reader does not change after its repair."""
    model, dense, kept, fed, _ = narrowed(name, batches=12, **overrides)
    layer, old = model.get_submodule(path), dense.get_submodule(path)
    x, y = inputs_of(model, fed, path), inputs_of(dense, fed, path)
    weight, bias = weight_of(old).double(), bias_of(old)
    target = y @ weight.T + (0 if bias is None else bias.double())
    if layer.weight.shape[0] < old.weight.shape[0] and path.endswith("transform.dense"):
        target = target[:, kept]
    design = x if bias is None else torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    solved = torch.linalg.lstsq(design, target, driver="gelsd", rcond=1e-5)  # A LayerNorm makes inputs dependent.
    best = design @ solved.solution
    found = x @ weight_of(layer).double().T + (0 if bias is None else bias_of(layer).double())
    torch.testing.assert_close(found, best, atol=5e-3, rtol=1e-3)
    assert (best - target).square().mean() > 1e-3, "a perfect fit would hide a wrong target"


@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("reconstruction", ["least-squares", "bias", "two-step"])
def test_no_repair_raises_the_error_on_its_own_tokens(name, reconstruction):
    _, _, _, _, report = narrowed(name, ridge=0.01, reconstruction=reconstruction)
    assert report
    for path, entry in report.items():
        assert entry["error"] <= entry["error_before"] + 1e-9, path
    if reconstruction == "least-squares":
        assert sum(e["error"] for e in report.values()) < 0.8 * sum(e["error_before"] for e in report.values())


def test_held_out_tokens_can_refuse_a_repair():
    """From three tokens to 36 channels no ridge helps, and a milder repair is never worse on the tokens that judge."""
    _, _, _, _, report = narrowed("gpt2", ridge=1e-6, held=range(1, 8), batches=8)
    assert all(entry["error"] <= entry["error_before"] + 1e-9 for entry in report.values())


def test_a_tied_head_is_left_alone_and_an_own_one_is_repaired():
    tied, dense, kept, _, report = narrowed("llama")
    assert "lm_head" not in report
    assert torch.equal(tied.lm_head.weight, dense.lm_head.weight[:, kept])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head" in narrowed("llama", tie_word_embeddings=False)[-1]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gemma2"])
def test_repair_brings_the_model_nearer_to_the_dense_one(name):
    model, dense, kept, _, _ = narrowed(name, ridge=0.05, batches=40)
    bare = tiny_model(name)
    narrow_hidden_(bare, kept)
    fed = tiny_inputs(dense, seed=99)
    wanted = outputs(dense, fed)
    wanted = wanted[..., kept] if wanted.shape[-1] != outputs(bare, fed).shape[-1] else wanted
    assert (outputs(model, fed) - wanted).square().mean() < (outputs(bare, fed) - wanted).square().mean()


def test_writers_only_lose_rows():
    model, dense, kept, _, _ = narrowed("gpt2")
    for path in ("transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_proj"):
        assert torch.equal(model.get_submodule(path).weight, dense.get_submodule(path).weight[:, kept])
        assert torch.equal(model.get_submodule(path).bias, dense.get_submodule(path).bias[kept])


def test_energy_finds_the_channels_that_nobody_listens_to():
    model = tiny_model("gpt2")
    quiet = torch.tensor([1, 5, 17, 40])
    with torch.no_grad():
        for block in model.transformer.h:
            block.ln_1.weight[quiet] = block.ln_1.bias[quiet] = 0.0
            block.ln_2.weight[quiet] = block.ln_2.bias[quiet] = 0.0
        model.transformer.ln_f.weight[quiet] = model.transformer.ln_f.bias[quiet] = 0.0
    fed = [tiny_inputs(model)]
    axis = find_hidden(model)
    scores = reader_energy(BlockStream(model, fed), axis, [0], silent)
    assert sorted(scores.argsort()[:4].tolist()) == quiet.tolist()
    assert (scores[quiet] == 0).all()
    assert sorted(reader_magnitude(axis).argsort()[:4].tolist()) != quiet.tolist()


def test_energy_and_magnitude_by_hand():
    model = tiny_model("llama", num_hidden_layers=1)
    axis = find_hidden(model)
    fed = tiny_inputs(model)
    shares, sizes = [], []
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        shares.append(share_of(model, f"model.layers.0.{path}", fed))
        sizes.append(size_of(model, f"model.layers.0.{path}"))
    shares.append(share_of(model, "lm_head", fed))
    sizes.append(size_of(model, "lm_head"))
    found = reader_energy(BlockStream(model, [fed]), axis, [0], silent)
    torch.testing.assert_close(found, torch.stack(shares).mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(reader_magnitude(axis), torch.stack(sizes).mean(0), rtol=1e-6, atol=0)


def share_of(model, path, fed):
    x, weight = inputs_of(model, [fed], path), model.get_submodule(path).weight.detach().double()
    return weight.square().sum(0) * x.square().sum(0) / (x @ weight.T).square().sum()


def size_of(model, path):
    weight = model.get_submodule(path).weight.detach().double()
    return weight.square().sum(0) / weight.square().sum()


@pytest.mark.parametrize("of", ["blocks", "model"])
@pytest.mark.parametrize("allocator", ["uniform", "error-curve"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_goes_with_hidden_channels_counts_towards_the_budget(name, allocator, of):
    model = tiny_model(name, num_hidden_layers=3)
    chosen = recipe(sparsity=0.5, hidden=0.25, allocator=allocator, of=of, per_block=True, bias=False)
    before = prunable(find_sites(model))
    report = prune_(model, calibration(model), chosen)
    after = prunable(find_sites(model))
    assert report.hidden["units"] == 48
    assert model.config.hidden_size == len(report.hidden["kept"]) == 36
    assert report.sparsity_of_blocks == pytest.approx(1 - after / before)
    share = report.sparsity_of_blocks if of == "blocks" else report.sparsity_of_model
    assert 0.5 - 3 * 3 * 36 * 40 / before < share <= 0.5
    assert report.sparsity_of_model == pytest.approx(1 - sum(p.numel() for p in model.parameters()) / SIZE[name])


SIZE = {name: sum(p.numel() for p in tiny_model(name, num_hidden_layers=3).parameters()) for name in ("llama", "bert")}


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


REFUSED = [
    ("llama", {"sparsity": 0.1}, BudgetError, r"hidden 0\.25 alone removes 6,336 parameters, and sparsity 0\.1 allows"),
    ("llama", {"hidden": 0.1, "multiple_of": 16}, BudgetError, r"48 stay, a multiple of 16.*at least 0\.3334"),
    ("llama", {"hidden": 0.1, "multiple_of": 64}, BudgetError, "leave it out"),
    ("bert", {}, RecipeError, r"bert: no stock config can say 36 hidden channels.*--per-block"),
    ("gemma2", {}, RecipeError, r"gemma2: no stock config can say 36 hidden channels"),
    ("gpt2", {"per_block": True, "sparsity": 0.99}, BudgetError, "cannot be met|at most"),
]


@pytest.mark.parametrize(("name", "overrides", "error", "says"), REFUSED)
def test_refusals_change_nothing(name, overrides, error, says):
    model = tiny_model(name)
    before, config = state(model), model.config.to_dict()
    with pytest.raises(error, match=says):
        prune_(model, calibration(model), recipe(**overrides))
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in before.items()}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.config.to_dict() == config


def test_less_than_a_step_left_for_the_sites_is_said_and_left():
    model = tiny_model("llama")
    report = prune_(model, calibration(model), recipe(sparsity=0.26, hidden=0.25, bias=False, multiple_of=4))
    assert 0.24 < report.sparsity_of_blocks <= 0.26
    assert all(entry["kept"] == entry["units"] for entry in report.sites.values())
    assert any("less than one step of" in note for note in report.notes)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(RecipeError, match=r"hidden must be in \[0, 1\)"):
        recipe(hidden=share)


def test_magnitude_without_repair_reads_no_text():
    chosen = recipe(reconstruction="none", held_out=0.0, bias=False)
    assert not chosen.reads_text
    assert recipe(reconstruction="none", held_out=0.0, hidden_criterion="energy").reads_text
    model = tiny_model("llama")
    report = prune_(model, Batches(batches=[], facts={"tokens": 0}), chosen)
    assert "readers" not in report.hidden
    assert model.config.hidden_size == 36


def test_projected_embeddings_are_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"embed_tokens: its vectors have 24 entries.*hidden size is 48"):
        find_hidden(tiny_model("opt", word_embed_proj_dim=24))


def test_a_norm_of_heads_as_long_as_the_hidden_size_is_refused_by_name():
    with pytest.raises(ArchitectureError, match=r"self_attn\.q_norm: a norm of producers' outputs has 48 entries"):
        find_hidden(tiny_model("qwen3", head_dim=48))


def test_a_parameter_that_nothing_describes_is_refused_by_name():
    model = tiny_model("llama")
    model.model.layers[1].mlp.gate = torch.nn.Linear(48, 2)
    with pytest.raises(ArchitectureError, match=r"layers\.1\.mlp\.gate\.weight: an axis of 48 entries"):
        find_hidden(model)


def test_a_layer_that_does_not_have_the_hidden_size_is_refused_by_name():
    model = tiny_model("llama")
    model.config.hidden_size = 40
    with pytest.raises((ArchitectureError, UnsupportedModelError), match=r"48 .*hidden size is 40"):
        find_hidden(model)


FAULTS = [
    ("bert", {"hidden_writers": ("pooler.dense",)}, {"model_class": "BertForMaskedLM"}),
    ("bert", {"hidden_writers": ("predictions.transform.dense",)}, {"model_class": "BertForSequenceClassification"}),
]


@pytest.mark.parametrize(("name", "fault", "overrides"), FAULTS)
def test_planted_faults_are_caught(monkeypatch, name, fault, overrides):
    right = lookup(name)
    monkeypatch.setitem(ARCHITECTURES._items, name, replace(right, **fault))
    with pytest.raises((AssertionError, RuntimeError)):
        check_hidden(lambda: tiny_model(name, **overrides))


@pytest.mark.parametrize("role", ["norm", "reader", "writer", "embedding"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_check_sees_other_channels_removed_from_one_place(monkeypatch, name, role):
    """Swap two kept channels in the first place of a role, after narrowing."""
    honest = testing.narrow_hidden_

    def spoiled(model, kept):
        honest(model, kept)
        cut = next(cut for cut in find_hidden(model).cuts if cut.role == role)
        parameter = cut.module.get_parameter(cut.parameter)
        order = torch.arange(len(kept))
        order[[0, 1]] = order[[1, 0]]
        parameter.data = parameter.data.index_select(cut.dim, order)

    monkeypatch.setattr(testing, "narrow_hidden_", spoiled)
    with pytest.raises(AssertionError, match="differs from silencing"):
        check_hidden(lambda: tiny_model(name))


def test_a_narrowed_folder_can_be_pruned_again(tmp_path):
    model = tiny_model("bert", num_hidden_layers=3)
    save(model, prune_(model, calibration(model), recipe(per_block=True)), tmp_path / "once")
    again = load(tmp_path / "once")
    plain = recipe(per_block=True, sparsity=0.2, hidden=0.0)
    save(again, prune_(again, calibration(again), plain), tmp_path / "twice")
    assert load(tmp_path / "twice").config.hidden_size == 36


def test_folders_from_before_open():
    """A pruning.json without the key says that all channels are there."""
    model = tiny_model("llama")
    wanted = widths(model)
    assert "hidden" not in wanted
    narrow_to_(model, wanted)
    assert model.config.hidden_size == 48


@pytest.mark.parametrize("call", [calibrate, lambda *a, **k: prune_sizes(*a, [0.3, 0.5], **k)])
def test_several_sizes_and_saved_calibrations_refuse_hidden_channels(call, tiny_folder, text_file, tmp_path):
    with pytest.raises(RecipeError, match=r"hidden 0\.25 does not go with"):
        call(tiny_folder("llama"), tmp_path / "out", recipe="liar", text=text_file, hidden=0.25)
    assert list(tmp_path.iterdir()) == []


def test_families_in_memory_refuse_hidden_channels():
    with pytest.raises(RecipeError, match=r"hidden 0\.25 goes with one size"):
        next(prune_family(lambda: tiny_model("llama"), calibration(tiny_model("llama")), recipe(), [0.5]))
