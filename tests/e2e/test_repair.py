"""`prunelm repair`: somebody's pruned model, solved again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import prunelm
from prunelm.sites import find_sites, narrow_

SMALL = ("--samples", "48", "--length", "32")


@pytest.fixture(scope="module")
def plain(cli, tiny_folder, tmp_path_factory):
    """A folder pruned without any repair, for some family, by group or query heads."""
    made = {}

    def make(family, *options):
        key = (family, options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("plain") / "out"
            command = (
                "prune",
                tiny_folder(family),
                made[key],
                "--recipe",
                "l1",
                "--sparsity",
                "0.28",
                "--multiple-of",
                "1",
            )
            ran = cli(*command, *options)
            assert ran.code == 0, ran
        return made[key]

    return make


def _kl(folder, dense, text):
    return prunelm.evaluate(folder, text, against=dense, length=32, max_tokens=1024).kl


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("with_plan", "options"),
    [(True, ()), (False, ()), (True, ("--per-block", "--allocator", "per-module"))],
    ids=["by plan", "by rows", "per block"],
)
def test_a_repaired_model_is_nearer_to_the_dense_one(
    family, with_plan, options, cli, plain, tiny_folder, text_file, tmp_path
):
    dense, pruned = tiny_folder(family), plain(family, *options)
    if not with_plan:
        pruned = shutil.copytree(pruned, tmp_path / "without-plan")
        (pruned / "pruning.json").unlink()
    ran = cli("repair", dense, pruned, tmp_path / "out", "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    how = "named in its pruning.json" if with_plan else "found by matching producer rows"
    assert how in ran.err
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    given = json.loads((plain(family, *options) / "pruning.json").read_text())
    assert facts["parameters"]["after"] == given["parameters"]["after"]
    assert facts["loader"] == given["loader"]
    assert all(facts["sites"][key]["kept"] == site["kept"] for key, site in given["sites"].items())
    assert _kl(tmp_path / "out", dense, text_file) < _kl(pruned, dense, text_file)


def test_steps_of_natural_gradient_end_a_repair_and_a_prune(cli, plain, tiny_folder, text_file, tmp_path):
    dense, pruned, told = tiny_folder("llama"), plain("llama"), "natural gradient: divergence"
    commands = {
        "repaired": ("repair", dense, pruned, tmp_path / "repaired", "--natural-steps", "2"),
        "with": ("prune", dense, tmp_path / "with", "--sparsity", "0.28", "--natural-steps", "1"),
        "without": ("prune", dense, tmp_path / "without", "--sparsity", "0.28", "--natural-steps", "0"),
    }
    for name, command in commands.items():
        ran = cli(*command, "--text", text_file, *SMALL)
        assert ran.code == 0, ran
        assert (told in ran.err) == (name != "without"), ran.err
    steps = {
        name: json.loads((tmp_path / name / "pruning.json").read_text())["recipe"]["natural_steps"] for name in commands
    }
    assert steps == {"repaired": 2, "with": 1, "without": 0}


def test_query_heads_are_matched_too(cli, tiny_folder, text_file, tmp_path):
    dense = tiny_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(dense)
    for site in [s for s in find_sites(model, "query") if s.name == "attention"]:
        per = site.n_units // site.strata
        narrow_(site, torch.cat([torch.arange(1, per) + s * per for s in range(site.strata)]))
    model.config.num_attention_heads -= model.config.num_key_value_heads
    model.config.head_dim = 8
    model.save_pretrained(tmp_path / "pruned")
    for file in dense.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "pruned")
    ran = cli("repair", dense, tmp_path / "pruned", tmp_path / "out", "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert facts["recipe"]["unit"] == "query"
    assert _kl(tmp_path / "out", dense, text_file) < _kl(tmp_path / "pruned", dense, text_file)


def test_what_cannot_be_repaired_is_said(cli, plain, tiny_folder, text_file, tmp_path):
    dense = tiny_folder("llama")
    pruned = shutil.copytree(plain("llama"), tmp_path / "without-plan")
    (pruned / "pruning.json").unlink()
    other = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + 0.5 * torch.rand_like(parameter))
    other.save_pretrained(tmp_path / "other")
    for file in dense.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    command = ("--text", text_file, *SMALL)
    for given, says in (
        ((dense, dense), "there is nothing to repair"),
        ((tmp_path / "other", pruned), "like no unit of the dense model"),
        ((tmp_path / "other", plain("llama")), "pruning.json says that unit"),
        ((tiny_folder("llama", num_hidden_layers=3), pruned), "the dense one has 3 blocks, the pruned one 2"),
        ((tiny_folder("gpt2"), pruned), "the dense one is gpt2, the pruned one llama"),
        ((tiny_folder("gpt2"), plain("llama")), "the dense one is gpt2, the pruned one llama"),
        ((tiny_folder("qwen3"), plain("llama")), "the dense one is qwen3, the pruned one llama"),
        ((tiny_folder("bert"), pruned), "the dense one is bert, the pruned one llama"),
        ((dense, plain("gpt2")), "the dense one is llama, the pruned one gpt2"),
        ((tmp_path / "nowhere", pruned), "no such model"),
    ):
        ran = cli("repair", *given, tmp_path / "out", *command)
        assert ran.code == 1
        assert says in ran.err
        assert ran.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


def _notes(folder):
    return " ".join(json.loads((folder / "pruning.json").read_text())["notes"])


def _biases(folder):
    return sorted(key for key in load_file(folder / "model.safetensors") if key.endswith("down_proj.bias"))


def test_biases_that_the_pruned_model_has_are_solved_again(cli, tiny_folder, text_file, tmp_path):
    dense, command = tiny_folder("llama"), ("--text", text_file, *SMALL)
    size = ("--sparsity", "0.28", "--multiple-of", 1)
    ran = cli("prune", dense, tmp_path / "flap", "--recipe", "flap", *size, *command)
    assert ran.code == 0, ran
    assert _biases(tmp_path / "flap")
    for name, options, says in (
        ("as-it-is", (), "flap has biases that the dense model lacks, so the repair adds them too"),
        ("without", ("--no-bias",), "the biases that flap has and the dense model lacks are left out"),
        ("none", ("--reconstruction", "none"), "the biases that flap has and the dense model lacks are left out"),
    ):
        ran = cli("repair", dense, tmp_path / "flap", tmp_path / name, *command, *options)
        assert ran.code == 0, ran
        assert says in ran.err
        assert says in _notes(tmp_path / name)
        assert bool(_biases(tmp_path / name)) == (name == "as-it-is")
        facts = json.loads((tmp_path / name / "pruning.json").read_text())
        stored = sum(tensor.numel() for tensor in load_file(tmp_path / name / "model.safetensors").values())
        assert facts["parameters"]["after"] == stored
    assert _kl(tmp_path / "as-it-is", dense, text_file) < _kl(tmp_path / "flap", dense, text_file)


def test_a_repair_of_biases_alone_needs_some(cli, plain, tiny_folder, text_file, tmp_path):
    dense, pruned, command = tiny_folder("llama"), plain("llama"), ("--text", text_file, *SMALL)
    useless = "llama: attention and ffn have no bias, so reconstruction 'bias' changes nothing there; --bias gives"
    alone = ("--reconstruction", "bias")
    for name, words, said in (
        ("without", ("repair", dense, pruned, tmp_path / "without", *alone), True),
        ("with", ("repair", dense, pruned, tmp_path / "with", *alone, "--bias", "--held-out", "0"), False),
        ("pruned", ("prune", dense, tmp_path / "pruned", "--sparsity", "0.28", "--recipe", "l1", *alone), True),
    ):
        ran = cli(*words, *command)
        assert ran.code == 0, ran
        assert (useless in ran.err) == said
        assert (useless in _notes(tmp_path / name)) == said
        assert bool(_biases(tmp_path / name)) != said
    ran = cli("repair", tiny_folder("gpt2"), plain("gpt2"), tmp_path / "gpt2", *command, *alone)
    assert ran.code == 0, ran
    assert "changes nothing" not in ran.err


def test_messages_name_options_that_repair_has(cli, plain, tiny_folder, text_file, tmp_path):
    command = ("repair", tiny_folder("llama"), plain("llama"), tmp_path / "out", "--text", text_file, "--length", 32)
    for options, says in (
        (("--samples", "1"), "Give more text, more --samples or --length.\n"),
        (("--samples", "1", "--bias"), "Give more text, more --samples or --length, or --reconstruction bias.\n"),
        (("--samples", "1", "--length", "64", "--natural-steps", "1"), "Give more text or --samples, or a smaller"),
        (("--held-out", "0", "--natural-steps", "1"), "natural_steps measure on held-out tokens: held_out must be"),
        (("--ridge", "-1"), "ridge must be a number from 0 up"),
    ):
        ran = cli(*command, *options)
        assert ran.code == 1
        assert says in ran.err
        assert ran.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    ran = cli(*command, "--ridge", "0.5", "--held-out", "0.25")
    assert ran.code == 0, ran
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())["recipe"]
    assert (recipe["ridge"], recipe["held_out"]) == (0.5, 0.25)


def test_where_a_refit_changed_the_producers_the_embeddings_are_compared(cli, tiny_folder, text_file, tmp_path):
    dense, command = tiny_folder("llama"), ("--text", text_file, *SMALL)
    ran = cli(
        "prune", dense, tmp_path / "goa", "--recipe", "goa-budget", "--sparsity", "0.28", "--multiple-of", 1, *command
    )
    assert ran.code == 0, ran
    ran = cli("repair", dense, tmp_path / "goa", tmp_path / "out", *command)
    assert ran.code == 0, ran
    assert "only its embeddings could be compared with those of the dense one" in ran.err
    notes = json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"]
    assert any("only its embeddings could be compared" in note for note in notes)
    other = tiny_folder("llama", rope_theta=500_000.0, num_hidden_layers=2, seed=7)
    ran = cli("repair", other, tmp_path / "goa", tmp_path / "other", *command)
    assert ran.code == 1
    assert "the embeddings of the pruned model are not those of the dense model" in ran.err


def test_a_relabeled_folder_is_repaired(cli, tiny_folder, text_file, tmp_path):
    """Eight heads do not divide a hidden size of 50, so the config of stock Llama cannot say what stays."""
    heads = {"num_attention_heads": 10, "num_key_value_heads": 5}
    dense, command = tiny_folder("llama", hidden_size=50, **heads), ("--text", text_file, *SMALL)
    ran = cli("prune", dense, tmp_path / "pruned", "--recipe", "l2", "--sparsity", "0.3", "--multiple-of", 1)
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["model_type"] == "mistral"
    ran = cli("repair", dense, tmp_path / "pruned", tmp_path / "out", *command, "--bias")
    assert ran.code == 0, ran
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "granite"
    ran = cli("repair", dense, tmp_path / "out", tmp_path / "again", *command)
    assert ran.code == 0, ran
    assert _biases(tmp_path / "again") == _biases(tmp_path / "out")


def test_a_model_without_some_ffn_is_repaired(cli, tiny_folder, text_file, tmp_path):
    dense, plan = tiny_folder("llama"), tmp_path / "plan.json"
    assert cli("plan", dense, plan, "--recipe", "l2", "--sparsity", "0.3", "--multiple-of", "1").code == 0
    data = json.loads(plan.read_text())
    data["recipe"] |= {"min_units": 0, "per_block": True}
    data["sites"] |= {"0.ffn": {"keep": 30}, "1.ffn": {"keep": 0}}
    plan.write_text(json.dumps(data))
    assert cli("prune", dense, tmp_path / "pruned", "--plan", plan).code == 0
    ran = cli("repair", dense, tmp_path / "pruned", tmp_path / "out", "--text", text_file, *SMALL)
    assert ran.code == 0, ran
    before, after = (json.loads((tmp_path / name / "pruning.json").read_text()) for name in ("pruned", "out"))
    assert after["widths"] == before["widths"]
    assert after["widths"]["1.ffn"] == {"units": 0}
