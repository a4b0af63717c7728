"""Texts are read as they are, cut into the windows that were asked for, and named by a fingerprint."""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from conftest import make_byte_tokenizer, pseudo_english
from prunelm.data import (
    Batches,
    check_length,
    describe,
    padded_batches,
    prefix_ids,
    read_documents,
    read_labeled,
    sample_batches,
    split_windows,
    token_ids,
)
from prunelm.errors import DataError, PruneLMError
from prunelm.testing import tiny_model

CONFIG = LlamaConfig(vocab_size=300, max_position_embeddings=128)
DOCUMENTS = [pseudo_english(700, seed) for seed in range(12)]


@pytest.fixture
def sample(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Batches]:
    def run(documents: list[str] | None = None, **changes: Any) -> Batches:
        options = {"samples": 6, "length": 32, "seed": 0, "causal": True, "batch_size": 4, **changes}
        return sample_batches(documents or DOCUMENTS, byte_tokenizer, CONFIG, **options)

    return run


def rows(batches: Batches) -> list[list[int]]:
    return [row.tolist() for batch in batches.batches for row in batch["input_ids"]]


# Reading.


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ""])
def test_a_plain_file_is_one_document(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"text{suffix}"
    path.write_text("First.\n\nSecond, caf\u00e9.\n", encoding="utf-8")
    assert read_documents(path) == ["First.\n\nSecond, caf\u00e9.\n"]
    assert read_documents(str(path)) == read_documents(path)


def test_a_jsonl_file_has_a_document_per_line(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    lines = [{"text": "one", "sentence": "other"}, {"sentence": "two", "label": 1}, {"text": " "}, {"text": "three"}]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_documents(path) == ["one", "two", "three"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_only_a_line_feed_ends_a_line_of_jsonl(mark: str, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    texts = [f"before{mark}after", "second"]
    # JSON strings may hold these as they are.
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert read_documents(path) == texts


def test_a_jsonl_file_from_windows(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert read_documents(path) == ["one", "two"]


def test_a_folder_is_read_in_order_of_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep.md").write_text("third")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n{"text": "second"}\n')
    (tmp_path / "c.txt").write_text("fourth")
    (tmp_path / "d.py").write_text("never")
    (tmp_path / "e.txt").mkdir()
    assert read_documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(DataError, match=r"b\.txt: the file holds no text"):
        read_documents(tmp_path)


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('\n\n{"text": "one"}\n\n{"text": 2}\n')
    with pytest.raises(DataError, match=re.escape(f"{path}, line 5: no text field; one of text, sentence")):
        read_documents(path)
    path.write_text('{"text": "one"}\n' + "[" * 100_000)
    with pytest.raises(DataError, match="line 2: not JSON"):
        read_documents(path)


def test_errors_of_texts_are_errors_of_the_user() -> None:
    assert issubclass(DataError, PruneLMError)
    assert issubclass(DataError, ValueError)


def test_numbers_and_letters_that_python_takes_and_others_do_not(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "one", "n": ' + "1" * 5000 + "}\n", encoding="utf-8")
    with pytest.raises(DataError, match="line 1: not JSON"):
        read_documents(path)
    path.write_text('{"text": "one"}\n{"text": "half \\ud83d of it"}\n{"text": "\\ud83d\\ude42"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2: half of a surrogate pair"):
        read_documents(path)


def test_labels_are_those_of_the_model_and_part_of_the_fingerprint(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_model("bert", vocab_size=300).config
    sizes = {"samples": 4, "length": 16, "seed": 0, "causal": False}

    def made(labels: list[int]) -> Batches:
        return sample_batches(["a", "b", "c", "d"], byte_tokenizer, config, labels=labels, **sizes)

    assert made([0, 1, 0, 1]).facts["sha256"] == made([1, 1, 0, 1]).facts["sha256"]
    assert made([0, 1, 0, 1]).facts != made([1, 1, 0, 1]).facts
    with pytest.raises(DataError, match="the text has label 7, but the model knows 2 labels"):
        made([0, 1, 7, 1])


def test_labeled_lines(tmp_path: Path) -> None:
    path = tmp_path / "labeled.jsonl"
    path.write_text('{"sentence": "good", "label": 1}\n\n{"text": "bad", "label": 0, "more": null}\n')
    assert read_labeled(path) == [("good", 1), ("bad", 0)]


@pytest.mark.parametrize("label", ['"1"', "null", "0.5"])
def test_labels_are_whole_numbers(label: str, tmp_path: Path) -> None:
    path = tmp_path / "labeled.jsonl"
    path.write_text(f'{{"sentence": "good", "label": 1}}\n{{"sentence": "bad", "label": {label}}}\n')
    with pytest.raises(DataError, match=r"labeled\.jsonl, line 2: no whole-number field 'label'"):
        read_labeled(path)


# Tokens and windows.


def test_token_ids_have_no_special_tokens_and_no_limit() -> None:
    tokenizer = make_byte_tokenizer(adds_bos=True)
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = token_ids("a word " * 10, tokenizer)
    assert len(ids) == 70
    assert tokenizer.bos_token_id not in ids
    assert tokenizer.decode(ids) == "a word " * 10


def test_prefix_is_what_the_tokenizer_adds_by_itself(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    assert prefix_ids(byte_tokenizer) == []
    assert prefix_ids(make_byte_tokenizer(adds_bos=True)) == [1]


def test_windows_do_not_overlap_and_a_short_end_is_left_out() -> None:
    windows = split_windows(list(range(11)), 3)
    assert [window.tolist() for window in windows] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert [window.tolist() for window in split_windows(list(range(6)), 3)] == [[0, 1, 2], [3, 4, 5]]
    assert split_windows([1, 2], 3) == []


def test_windows_begin_with_the_prefix_and_keep_their_length() -> None:
    windows = split_windows(list(range(10, 17)), 4, [1])
    assert [window.tolist() for window in windows] == [[1, 10, 11, 12], [1, 13, 14, 15]]


# Samples for calibration.


def test_samples_are_windows_of_the_joined_documents(
    sample: Callable[..., Batches], byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    found = sample(samples=6, batch_size=4)
    assert [tuple(batch["input_ids"].shape) for batch in found.batches] == [(4, 32), (2, 32)]
    assert found.tokens == found.facts["tokens"] == 6 * 32
    assert found.facts["sequences"] == 6
    assert found.facts["length"] == 32
    assert found.facts["seed"] == 0
    everything = [document + "\n\n" for document in DOCUMENTS]
    for row in rows(found):
        text = byte_tokenizer.decode(row)
        parts = text.split("\n\n")
        assert all(any(part in document for document in everything) for part in parts), text
    assert len({tuple(row) for row in rows(found)}) == 6


def test_samples_depend_on_the_seed_and_on_nothing_else(sample: Callable[..., Batches]) -> None:
    torch.manual_seed(1)
    first = sample(seed=3)
    torch.manual_seed(2)
    assert rows(sample(seed=3)) == rows(first)
    assert sample(seed=3).facts == first.facts
    assert rows(sample(seed=4)) != rows(first)
    assert sample(seed=4).facts["sha256"] != first.facts["sha256"]
    assert rows(sample(seed=3, batch_size=2)) == rows(first)
    assert sample(seed=3, batch_size=2).facts == first.facts


def test_samples_begin_with_bos_where_the_tokenizer_says_so() -> None:
    tokenizer = make_byte_tokenizer(adds_bos=True)
    found = sample_batches(DOCUMENTS, tokenizer, CONFIG, samples=5, length=16, seed=0, causal=True)
    assert all(row[0] == 1 and 1 not in row[1:] and len(row) == 16 for row in rows(found))


def test_less_text_than_wanted_gives_what_there_is(sample: Callable[..., Batches]) -> None:
    found = sample(["x" * 100], samples=50, length=32)
    assert found.facts["sequences"] == 3
    assert found.tokens == 96


def test_too_little_text_says_how_much_is_needed(sample: Callable[..., Batches]) -> None:
    with pytest.raises(DataError, match=r"gives \d\d tokens, but one calibration window needs 32 \(6 windows"):
        sample(["x" * 20])


def test_documents_are_not_changed(sample: Callable[..., Batches]) -> None:
    documents = list(DOCUMENTS)
    sample(documents, seed=5)
    assert documents == DOCUMENTS


def test_encoders_get_whole_documents(sample: Callable[..., Batches], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["short", "a longer document", "x" * 90]
    found = sample(documents, causal=False, samples=3, length=32, batch_size=3)
    (batch,) = found.batches
    texts = [byte_tokenizer.decode(row[mask.bool()]) for row, mask in zip(*both(batch), strict=True)]
    assert sorted(texts) == sorted(["short", "a longer document", "x" * 32])
    assert batch["input_ids"].shape == (3, 32)
    assert found.tokens == 5 + 17 + 32
    assert found.facts["sequences"] == 3
    assert sample(documents, causal=False, samples=2).facts["sequences"] == 2


def both(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("causal", [True, False])
def test_samples_longer_than_the_model_can_read(causal: bool, sample: Callable[..., Batches]) -> None:
    with pytest.raises(DataError, match="--length 129 is more than the 128 positions"):
        sample(length=129, causal=causal)
    assert sample(length=128, causal=causal).tokens > 0


def test_a_model_without_a_limit_reads_any_length() -> None:
    check_length(PreTrainedConfig(), 10**9)


# Padding and fingerprints.


def test_padded_batches(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["one", "three three", "x" * 50, "four"]
    batches = padded_batches(texts, byte_tokenizer, 20, 2)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 11), (2, 20)]
    assert [batch["attention_mask"].sum(1).tolist() for batch in batches] == [[3, 11], [20, 4]]
    for batch in batches:
        ids, mask = both(batch)
        assert bool((ids[mask == 0] == byte_tokenizer.pad_token_id).all())
        assert not bool((ids[mask == 1] == byte_tokenizer.pad_token_id).any())


def test_fingerprint_is_of_the_real_tokens_in_order(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["one", "three three", "four"]
    ids = [i for text in texts for i in token_ids(text, byte_tokenizer)]
    expected = hashlib.sha256(torch.tensor(ids).numpy().tobytes()).hexdigest()
    for batch_size in (1, 2, 3):
        facts = describe(padded_batches(texts, byte_tokenizer, 20, batch_size), byte_tokenizer, source="here")
        assert facts["sha256"] == expected
        assert facts["tokens"] == len(ids)
        assert facts["sequences"] == 3
        assert facts["source"] == "here"
        assert facts["tokenizer"].endswith("of 261 tokens")
    other = describe(padded_batches(texts[::-1], byte_tokenizer, 20, 3), byte_tokenizer)
    assert other["sha256"] != expected
    assert json.loads(json.dumps(facts)) == facts
