"""`prunelm prune --hidden`: fewer channels in the residual stream, written, opened elsewhere, refused by name."""

import json

import pytest
from tests import forked
from transformers import AutoModelForCausalLM

import prunelm

SIZE = ("--samples", "48", "--length", "32")
WIDTH = ("--hidden", "0.25", "--multiple-of", "4")


@pytest.fixture(scope="module")
def sentences(text_file, tmp_path_factory):
    """The text as one document per line, as encoders read it."""
    path = tmp_path_factory.mktemp("sentences") / "lines.jsonl"
    lines = [line for line in text_file.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def _prune(cli, model, out, text_file, *options, sparsity=0.4):
    command = ("prune", model, out, "--recipe", "liar", "--sparsity", sparsity, "--text", text_file)
    return cli(*command, *WIDTH, *SIZE, *options)


def _sizes_in_a_fresh_process(folder):
    script = "import sys, prunelm; m = prunelm.load(sys.argv[1]); print(m.config.hidden_size, m.num_parameters())"
    ran = forked.run("-c", script, str(folder))
    assert ran.returncode == 0, ran.stderr
    return [int(part) for part in ran.stdout.split()]


def test_a_narrow_llama_is_a_stock_llama(cli, tiny_folder, text_file, tmp_path):
    ran = _prune(cli, tiny_folder("llama"), tmp_path / "out", text_file, "--json")
    assert ran.code == 0, ran
    facts = json.loads(ran.out)
    assert facts["loader"] == "transformers"
    assert facts["widths"]["hidden"] == {"units": 36}
    assert 0.36 < facts["parameters"]["share_of_blocks"] <= 0.4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"]) == (36, 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[1] == 36
    assert facts["parameters"]["after"] == model.num_parameters()
    assert "| hidden channels | 48 | 36 |" in (tmp_path / "out" / "README.md").read_text()
    readers = facts["hidden"]["readers"]
    assert set(readers) >= {"0.self_attn.q_proj", "1.mlp.gate_proj"}
    assert all(entry["error"] <= entry["error_before"] for entry in readers.values())


def test_a_narrow_bert_opens_with_our_loader(cli, tiny_folder, sentences, tmp_path):
    folder = tiny_folder("bert", model_class="BertForSequenceClassification")
    ran = _prune(cli, folder, tmp_path / "out", sentences, "--per-block", "--json")
    assert ran.code == 0, ran
    facts = json.loads(ran.out)
    assert facts["loader"] == "prunelm"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 48
    assert _sizes_in_a_fresh_process(tmp_path / "out") == [36, facts["parameters"]["after"]]
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_dry_run_says_what_prune_does(cli, tiny_folder, text_file, tmp_path):
    planned = _prune(cli, tiny_folder("llama"), tmp_path / "out", text_file, "--no-bias", "--dry-run", "--json")
    assert planned.code == 0, planned
    said = json.loads(planned.out)
    assert said["kept"]["hidden"] == [36]
    assert not (tmp_path / "out").exists()
    done = _prune(cli, tiny_folder("llama"), tmp_path / "out", text_file, "--no-bias", "--json")
    facts = json.loads(done.out)["parameters"]
    assert said["parameters"] == facts["after"]
    assert said["share_of_blocks"] == pytest.approx(facts["share_of_blocks"], abs=1e-6)
    assert said["share_of_model"] == pytest.approx(facts["share_of_model"], abs=1e-6)


def test_refusals_are_one_line(cli, tiny_folder, text_file, tmp_path):
    out = tmp_path / "out"
    for options, says in (
        ((), "bert: no stock config can say 36 hidden channels"),
        (("--per-block", "--hidden", "0.05", "--multiple-of", "16"), "takes none: 48 stay, a multiple of 16"),
        (("--per-block", "--calibrated", tmp_path), "does not go with a saved calibration"),
    ):
        ran = _prune(cli, tiny_folder("bert"), out, text_file, *options)
        assert ran.code == 1
        assert says in ran.err.splitlines()[-1]
    ran = _prune(cli, tiny_folder("llama"), out, text_file, sparsity=0.1)
    assert ran.code == 1
    assert "hidden 0.25 alone removes" in ran.err.splitlines()[-1]
    ran = _prune(cli, tiny_folder("llama"), out, text_file, sparsity="0.3,0.5")
    assert ran.code == 1
    assert "does not go with several sizes" in ran.err.splitlines()[-1]
    assert not out.exists()


def test_a_narrow_model_is_not_repaired_afterwards(cli, tiny_folder, text_file, tmp_path):
    dense = tiny_folder("llama")
    options = ("--reconstruction", "none", "--held-out", "0")
    assert _prune(cli, dense, tmp_path / "out", text_file, *options).code == 0
    ran = cli("repair", dense, tmp_path / "out", tmp_path / "repaired", "--text", text_file, *SIZE)
    assert ran.code == 1
    assert "has 36 of 48 hidden channels" in ran.err.splitlines()[-1]


def test_bare_encoders_of_other_widths_are_not_compared(cli, tiny_folder, sentences, tmp_path):
    dense = tiny_folder("bert")
    assert _prune(cli, dense, tmp_path / "out", sentences, "--per-block").code == 0
    assert prunelm.evaluate(dense, sentences, against=dense, length=32, max_tokens=256).cosine == pytest.approx(1)
    ran = cli("evaluate", tmp_path / "out", "--text", sentences, "--against", dense, "--length", "32")
    assert ran.code == 1
    assert "embeddings of 36 and 48 channels" in ran.err.splitlines()[-1]
