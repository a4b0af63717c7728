"""`prunelm prune --recipe best`: a search that goes on, and one whose result opens anywhere."""

import json
import re

from transformers import AutoModelForCausalLM

SMALL = ("--samples", "24", "--length", "32", "--multiple-of", "1", "--sparsity", "0.3")


def test_a_search_is_not_made_twice(cli, tiny_folder, text_file, tmp_path):
    journal, plans = tmp_path / "search.jsonl", []
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "best", "--text", text_file, *SMALL)
    for _ in range(2):
        ran = cli(*command, "--journal", journal, "--force")
        assert ran.code == 0, ran
        assert "plans tried on" in ran.err
        plans.append(json.loads((tmp_path / "out" / "pruning.json").read_text())["sites"])
        lines = journal.read_text().splitlines()
    assert plans[0] == plans[1]
    rounds = [json.loads(line)["entry"] for line in lines[2:]]
    assert all(set(line) == {"removed", "divergence", "step", "trust", "settled", "tried"} for line in rounds)
    cut = "\n".join(lines[:-1])
    journal.write_text(cut + "\n")
    assert cli(*command, "--journal", journal, "--force").code == 0
    assert journal.read_text().splitlines() == lines


def test_a_policy_search_ends_the_same_after_an_interrupt(cli, tiny_folder, text_file, tmp_path):
    journal, command = tmp_path / "search.jsonl", ("prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "osp")
    options = ("--text", text_file, *SMALL, "--journal", journal, "--force")
    assert cli(*command, *options).code == 0
    lines, written = journal.read_text().splitlines(), _files(tmp_path / "out")
    journal.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    ran = cli(*command, *options)
    assert ran.code == 0
    assert "keep probabilities: held-out loss" in ran.err
    assert journal.read_text().splitlines() == lines
    assert _files(tmp_path / "out") == written


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_journal_serves_its_own_search_only(cli, tiny_folder, text_file, tmp_path):
    journal = tmp_path / "search.jsonl"
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL, "--journal", journal)
    ran = cli(*command, "--recipe", "obs")
    assert ran.code == 1
    assert "makes no search that a journal could keep" in ran.err
    assert cli(*command, "--recipe", "best").code == 0
    ran = cli(*command, "--recipe", "best", "--seed", "7", "--force")
    assert ran.code == 1
    assert "the journal of other work: " in ran.err
    ran = cli(*command[:-1], tmp_path / "no" / "such" / "folder", "--recipe", "best", "--force")
    assert ran.code == 1
    assert "does not exist. Make it first." in ran.err
    assert "Traceback" not in ran.err


def test_the_default_recipe_keeps_what_it_measured(cli, tiny_folder, text_file, tmp_path):
    journal = tmp_path / "search.jsonl"
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--text", text_file, *SMALL, "--journal", journal)
    assert cli(*command).code == 0
    lines, written = journal.read_text().splitlines(), _files(tmp_path / "out")
    journal.write_text("\n".join(lines[:-1]) + "\n")
    assert cli(*command, "--force").code == 0
    assert len(lines) > 2
    assert journal.read_text().splitlines() == lines
    assert _files(tmp_path / "out") == written


def test_an_evened_best_opens_in_plain_transformers(cli, tiny_folder, text_file, tmp_path):
    ran = cli(
        "prune", tiny_folder("llama"), tmp_path / "out", "--recipe", "best", "--uniform", "--text", text_file, *SMALL
    )
    assert ran.code == 0, ran
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert written["recipe"]["allocator"] == "split"
    tried = re.search(r"(\d+) plans tried on", "\n".join(written["notes"]))
    assert tried is not None
    assert int(tried[1]) > 1
    assert model.num_parameters() == written["parameters"]["after"]
