"""Text that says the same again is counted, told, and refused where it determines nothing."""

import json

import torch

from prunelm.data import sample_batches
from prunelm.repetition import distinct_beginnings, passages, repetition_notes
from prunelm.testing import tiny_model

OBS = ("--recipe", "obs", "--samples", "24", "--multiple-of", "1")


def test_passages_and_beginnings_are_counted_apart_from_padding():
    ids = torch.arange(40).repeat(2, 1)
    assert passages([{"input_ids": ids}]) == {"passages": 50, "distinct_passages": 25}
    assert distinct_beginnings([{"input_ids": ids}, {"input_ids": ids[:, :10]}]) == 40
    ids[1, 20] = 7
    assert passages([{"input_ids": ids}]) == {"passages": 50, "distinct_passages": 41}
    assert distinct_beginnings([{"input_ids": ids}]) == 60
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    assert passages([{"input_ids": ids, "attention_mask": mask}]) == {"passages": 2, "distinct_passages": 1}
    assert passages([]) == {"passages": 0, "distinct_passages": 0}
    assert distinct_beginnings([]) == 0


def test_a_sentence_said_again_is_told_and_ordinary_text_is_not(byte_tokenizer, text_file):
    def notes(text):
        sizes = {"samples": 24, "length": 64, "seed": 0, "causal": True}
        found = sample_batches([text], byte_tokenizer, tiny_model("llama", vocab_size=300).config, **sizes)
        return repetition_notes(found.facts)

    assert notes(text_file.read_text()) == []
    (note,) = notes("the cat sat on the mat. " * 2000)
    assert "of 1,176 passages of 16 tokens only 24 differ" in note
    assert repetition_notes({"tokens": 0, "source": "none needed"}) == []


def test_repeated_text_is_told_and_saved_once(cli, tiny_folder, tmp_path):
    text = tmp_path / "again.txt"
    text.write_text("the cat sat on the mat. " * 2000)
    read = ("--text", text, "--length", "64", *OBS)
    assert cli("calibrate", tiny_folder("llama"), tmp_path / "seen", *read).code == 0
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", *read)
    ran = cli(*command, "--calibrated", tmp_path / "seen")
    assert ran.code == 0, ran
    assert ran.err.count("the calibration text repeats itself: of") == 1
    notes = json.loads((tmp_path / "out" / "pruning.json").read_text())["notes"]
    assert sum("repeats itself" in note for note in notes) == 1


def test_text_that_determines_nothing_is_refused_with_numbers(cli, tiny_folder, tmp_path):
    text = tmp_path / "same.txt"
    text.write_text("a" * 60_000)
    command = ("prune", tiny_folder("llama"), tmp_path / "out", "--sparsity", "0.3", "--text", text, "--length", "32")
    ran = cli(*command, *OBS)
    assert ran.code == 1
    assert "of 768 tokens only 32 come after different text, and they cannot determine a refit of 48" in ran.err
    assert not (tmp_path / "out").exists()
    ran = cli(*command, *OBS, "--reconstruction", "none")
    assert ran.code == 0, ran
    assert "only 1 differ" in ran.err
