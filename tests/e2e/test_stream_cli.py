"""`prunelm prune --stream`: one block in memory at a time, and the same weights as with all of them there."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import prunelm
from prunelm import streamed_fisher
from prunelm.pressing import Pressing
from prunelm.recipe import RECIPES as RECIPES_FOLDER
from prunelm.report.command import command as command_of
from prunelm.testing import TINY
from prunelm.workbench import Workbench, place_of

SMALL = ("--samples", "12", "--length", "32", "--multiple-of", "1", "--sparsity", "0.3")
RECIPES = {
    "two-step": ("--recipe", "goa-budget"),
    "repair": ("--recipe", "obs"),
    "added biases": ("--recipe", "liar"),
    "no text": ("--recipe", "l1"),
    "one-shot": ("--recipe", "wanda-sp"),
    "a look at the dense model": ("--recipe", "flap"),
    "some blocks": ("--recipe", "obs", "--blocks", "1:2", "--per-block"),
    "half the bytes": ("--recipe", "obs", "--dtype", "bfloat16"),
}


@pytest.fixture
def unproven(monkeypatch):
    """Folders are not loaded again in a fresh process."""
    monkeypatch.setattr("prunelm.checkpoint.prove_folder", lambda *_: 0.0)


def weights(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def rest(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if "safetensors" not in p.name}


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_folders(one, other):
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].dtype == theirs[name].dtype and torch.equal(mine[name], theirs[name]) for name in mine)
    assert rest(one) == rest(other)


def check_same(cli, tmp_path, model, text, options):
    whole, streamed = tmp_path / "whole", tmp_path / "streamed"
    for out, more in ((whole, ()), (streamed, ("--stream",))):
        ran = cli("prune", model, out, "--text", text, *SMALL, *options, *more)
        assert ran.code == 0, ran
    same_folders(whole, streamed)
    assert len(list(streamed.glob("*.safetensors"))) > 2
    index = json.loads((streamed / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(streamed).keys()
    return ran


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_weights(name, cli, tiny_folder, text_file, tmp_path, monkeypatch, unproven):
    finished, together = Pressing.finished, []

    def watched(self, i):
        together.append([n for n, block in enumerate(self.shelf.blocks) if not next(block.parameters()).is_meta])
        finished(self, i)

    monkeypatch.setattr(Pressing, "finished", watched)
    ran = check_same(cli, tmp_path, tiny_folder("llama"), text_file, RECIPES[name])
    assert together == [[0], [1]]
    assert ("bytes of scratch in" in ran.err) == (name != "no text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["streamed", "whole"]


@pytest.mark.parametrize("family", [name for name in TINY if name != "llama"])
def test_the_same_weights_of_every_family(family, cli, tiny_folder, text_file, tmp_path, unproven):
    recipe = "wanda-sp" if family == "bert" else "obs"  # of one document, an encoder reads too little for a repair
    check_same(cli, tmp_path, tiny_folder(family), text_file, ("--recipe", recipe, "--sparsity", "0.2"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_fisher_matrices_are_streamed_back_through_the_blocks(
    family, cli, tiny_folder, text_file, tmp_path, monkeypatch, unproven
):
    recipe = tmp_path.parent / f"{tmp_path.name}.toml"
    lines = (RECIPES_FOLDER / "best.toml").read_text().replace("rounds = 12\n", "").replace("natural_steps = 4\n", "")
    lines = lines.replace('sites = ["ffn"]', "")
    recipe.write_text(lines.replace('"least-squares"', '"none"') if family == "bert" else lines)
    asked, backward = [], streamed_fisher.adder
    monkeypatch.setattr(streamed_fisher, "adder", lambda total: asked.append(total) or backward(total))
    ran = check_same(cli, tmp_path, tiny_folder(family), text_file, ("--recipe", recipe, "--sparsity", "0.2"))
    assert len(asked) == 4
    assert ran.err.count("bytes of scratch in") == 2


def test_proven_in_a_fresh_process_that_never_holds_it_whole(cli, tiny_folder, text_file, tmp_path):
    """Blocks of different widths, opened by the code in the folder and by prunelm.load."""
    out = tmp_path / "out"
    options = ("--recipe", "flap", "--stream", "--dtype", "bfloat16")
    ran = cli("prune", tiny_folder("llama"), out, "--text", text_file, *SMALL, *options)
    assert ran.code == 0, ran
    assert "same logits" in ran.out
    model = prunelm.load(out)
    assert model.dtype == torch.bfloat16
    written = json.loads((out / "pruning.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == written["parameters"]["after"]


def test_a_written_block_that_is_not_the_solved_one_is_noticed(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    finished = Pressing.finished

    def wrong(self, i):
        finished(self, i)
        file = self.folder / f"weights-{i}.safetensors"
        values = load_file(file)
        name = next(name for name in values if "down_proj" in name)
        save_file({**values, name: values[name] * 1.5}, file)

    monkeypatch.setattr(Pressing, "finished", wrong)
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL, "--stream")
    assert ran.code == 1
    assert "the written folder gives other logits" in ran.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--recipe", "goa-budget"), ("--recipe", "flap", "--dtype", "bfloat16")])
def test_a_killed_run_goes_on(options, cli, tiny_folder, text_file, tmp_path, monkeypatch, unproven):
    out, scratch, taken, put = tmp_path / "out", tmp_path / "scratch", [], Workbench.put
    scratch.mkdir()

    def watched(self, name, step):
        put(self, name, step)
        taken.append(tmp_path / f"snapshot-{len(taken)}")
        shutil.copytree(place_of(out), taken[-1] / "work")
        shutil.copytree(scratch, taken[-1] / "scratch")

    monkeypatch.setattr(Workbench, "put", watched)
    where = ("--stream", "--scratch", scratch)
    ran = cli("prune", tiny_folder("llama"), out, "--text", text_file, *SMALL, *options, *where)
    assert ran.code == 0, ran
    assert list(scratch.iterdir()) == []
    expected, moments = files(out), list(taken)
    for moment in moments:
        shutil.rmtree(out)
        shutil.rmtree(scratch)
        (moment / "work").rename(place_of(out))
        (moment / "scratch").rename(scratch)
        ran = cli("prune", "--resume", out)
        assert ran.code == 0, ran
        assert "streaming: one of 2 blocks" in ran.err
        assert files(out) == expected
        assert not place_of(out).exists()
        assert list(scratch.iterdir()) == []


def test_a_disk_too_small_for_the_scratch_file(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL, "--stream")
    real, scratch = shutil.disk_usage, tmp_path / "scratch"
    scratch.mkdir()
    small = usage._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small if scratch in (path, *path.parents) else real(path))
    ran = cli(*command, "--scratch", scratch)
    assert ran.code == 1
    found = re.search(r"need ([\d,]+) bytes of scratch.* in \S+, and 1,000 are free there", ran.err)
    assert found, ran.err
    assert int(found[1].replace(",", "")) >= 2 * 12 * 32 * 48 * 4
    ran = cli(*command, "--scratch", tmp_path / "nowhere")
    assert ran.code == 1
    assert "no such folder" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def test_a_disk_too_small_for_the_finished_blocks(cli, tiny_folder, text_file, tmp_path, monkeypatch):
    options = ("--recipe", "obs", "--text", text_file, *SMALL, "--stream")
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", *options)
    assert ran.code == 0, ran
    said = int(re.search(r"finished blocks take at most ([\d,]+) bytes", ran.err)[1].replace(",", ""))
    model = prunelm.load(tiny_folder("llama"))
    blocks = sum(p.numel() for p in model.model.layers.parameters())
    consumers = sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)
    assert said >= 4 * (blocks + consumers)
    monkeypatch.setattr("prunelm.scratch.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, said - 1))
    ran = cli("prune", tiny_folder("llama"), tmp_path / "other", *options)
    assert ran.code == 1
    assert re.search(rf"finished blocks need {said:,} bytes in \S+, and {said - 1:,} are free", ran.err), ran.err
    monkeypatch.setattr("prunelm.scratch.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, said))
    ran = cli("prune", tiny_folder("llama"), tmp_path / "other", *options)
    assert ran.code == 1
    assert re.search(rf"bytes of scratch, beside {said:,} of finished blocks, in \S+, and {said:,} are free", ran.err)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_scratch_file_cut_short_ends_the_run_and_loses_nothing(
    cli, tiny_folder, text_file, tmp_path, monkeypatch, unproven
):
    out, put = tmp_path / "out", Workbench.put
    command = ("prune", tiny_folder("llama"), out, "--text", text_file, *SMALL, "--stream", "--recipe", "goa-budget")
    assert cli(*command).code == 0
    expected = files(out)
    shutil.rmtree(out)

    def cutting(self, name, step):
        put(self, name, step)
        (file,) = place_of(out).rglob("hidden.bin")
        with file.open("r+b") as opened:
            opened.truncate(100)

    monkeypatch.setattr(Workbench, "put", cutting)
    monkeypatch.setattr("prunelm.workbench.WORTH_KEEPING", 0.0)
    ran = cli(*command)
    assert ran.code == 1
    assert "hidden.bin: cut short while it was in use: 100 bytes of at least" in ran.err
    assert ran.err.endswith(f"What is done is kept; go on with prunelm prune --resume {out}\n")
    monkeypatch.setattr(Workbench, "put", put)
    assert cli("prune", "--resume", out).code == 0
    assert files(out) == expected


def test_dtypes_that_change_numbers_are_said(cli, tiny_folder, text_file, tmp_path, unproven):
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL, "--recipe", "obs")
    ran = cli(*command, "--stream", "--scratch-dtype", "bfloat16", "--statistics-dtype", "float32")
    assert ran.code == 0, ran
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    again, _ = command_of(pruning)
    assert "--stream --scratch-dtype bfloat16 --statistics-dtype float32" in again
    assert "--dtype" not in again
    notes = pruning["notes"]
    assert "hidden states waited between blocks as bfloat16" in notes
    assert "statistics were summed in float32" in notes
    for options, says in (
        (("--scratch-dtype", "float32"), "belong to --stream"),
        (("--stream", "--scratch-dtype", "int8"), "--scratch-dtype must be one of float32"),
        (("--stream", "--statistics-dtype", "float16"), "--statistics-dtype must be one of float64, float32"),
        (("--stream", "--sparsity", "0.1,0.2"), "one size at a time"),
    ):
        ran = cli(*command, *options, "--force")
        assert ran.code == 1
        assert says in ran.err


def test_a_quantized_checkpoint_is_refused(cli, tiny_folder, text_file, tmp_path):
    model = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (model / "config.json").write_text(json.dumps(config))
    ran = cli("prune", model, tmp_path / "out", "--text", text_file, *SMALL, "--stream")
    assert ran.code == 1
    assert "this checkpoint is quantized" in ran.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("--recipe", "best"),
            "allocator 'fisher', which measures plans, needs the whole model: say rounds = 0",
        ),
        (("--recipe", "best-uniform"), "allocator 'split', which measures plans, needs the whole model"),
        (("--recipe", "sensitivity"), "allocator 'sensitivity', which measures plans, needs the whole model"),
        (("--recipe", "osp"), "a policy search needs the whole model"),
        (("--recipe", "hywia"), "criterion 'fused', which reads gradients, needs the whole model"),
        (("--recipe", "liar", "--hidden", "0.25", "--per-block"), "leave --hidden out"),
        (("--self-generated",), "self-generated text needs the whole model: give --text FILE"),
    ],
)
def test_what_needs_the_whole_model_is_refused_by_name(options, says, cli, tiny_folder, text_file, tmp_path):
    text = () if "--self-generated" in options else ("--text", text_file)
    ran = cli("prune", tiny_folder("llama"), tmp_path / "out", *text, *SMALL, *options, "--stream")
    assert ran.code == 1
    assert says in ran.err
    assert ran.err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []
