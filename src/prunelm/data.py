"""Text to token batches, with a fingerprint of what was used."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from .errors import DataError
from .overlap import sketch
from .repetition import passages
from .stream import Batch

SUFFIXES = {".txt", ".md", ".jsonl"}
TEXT_FIELDS = ("text", "sentence")
JOIN = "\n\n"
BATCH_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The token that hides another, and those that are never hidden."""

    token: int
    special: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Batches:
    """Token batches and the facts about them that every result must carry.

    A batch may hold `labels`, one a sequence; `masking` is the tokenizer's, where it has a mask token. `batch_tokens`
    is how many tokens go through a model at once.
    """

    batches: list[Batch]
    facts: dict[str, Any]
    masking: Masking | None = None
    batch_tokens: int = BATCH_TOKENS

    def to(self, device: torch.device) -> "Batches":
        """These batches on a device."""
        moved: list[Batch] = [{name: value.to(device) for name, value in batch.items()} for batch in self.batches]
        return replace(self, batches=moved)

    @property
    def tokens(self) -> int:
        """Real tokens, padding apart."""
        return int(self.facts["tokens"])

    def split(self, share: float) -> tuple["Batches", "Batches"]:
        """These batches without every n-th sequence, n = 1 / share rounded, and the sequences left out.

        Where there are fewer than n, the last one is left out; with share 0, or fewer than two sequences, none is.
        """
        total = sum(len(batch["input_ids"]) for batch in self.batches)
        if share == 0 or total < 2:
            return self, replace(self, batches=[], facts={"tokens": 0, "sequences": 0})
        every, start = min(max(2, round(1 / share)), total), 0
        parts: tuple[list[Batch], list[Batch]] = ([], [])
        for batch in self.batches:
            number = torch.arange(len(batch["input_ids"]), device=batch["input_ids"].device) + start
            start += len(number)
            last = number % every == every - 1
            for mine, rows in zip(parts, (~last, last), strict=True):
                if bool(rows.any()):
                    mine.append({name: value[rows] for name, value in batch.items()})
        fit, held = (replace(self, batches=_joined(p, self.batch_tokens), facts=_counts(p)) for p in parts)
        return fit, held

    def at_least(self, count: int) -> "Batches":
        """The same sequences in at least so many batches, as far as there are sequences."""
        if len(self.batches) >= count:
            return self
        rows = max(1, sum(len(batch["input_ids"]) for batch in self.batches) // count)
        batches: list[Batch] = []
        for batch in self.batches:
            starts = range(0, len(batch["input_ids"]), rows)
            batches += [{name: value[i : i + rows] for name, value in batch.items()} for i in starts]
        return replace(self, batches=batches)


def sequences_at_once(length: int, tokens: int = BATCH_TOKENS) -> int:
    """Sequences in a batch: enough for fast matrix products, few enough for their activations to stay small."""
    return max(1, tokens // length)


def _joined(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The same sequences in batches of the usual size, as far as their shapes agree."""
    joined: list[Batch] = []
    for batch in batches:
        last = joined[-1] if joined else None
        (count, length) = batch["input_ids"].shape
        most = sequences_at_once(length, tokens) - count
        if last is not None and last["input_ids"].shape[1] == length and len(last["input_ids"]) <= most:
            joined[-1] = {name: torch.cat([last[name], batch[name]]) for name in batch}
        else:
            joined.append(batch)
    return joined


def _counts(batches: Sequence[Batch]) -> dict[str, Any]:
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    return {"tokens": sum(int(mask.sum()) for mask in masks), "sequences": sum(len(mask) for mask in masks)}


def read_documents(path: str | Path) -> list[str]:
    """The documents of a text file, a .jsonl file (field `text` or `sentence`), or a folder of such files.

    A .txt or .md file is one document; a .jsonl file has one document per line.

    Raises:
        DataError: not there, empty, not text, or a line without a text field (named by number).
    """
    path = Path(path)
    if path.is_dir():
        files = text_files(path)
        if not files:
            raise DataError(f"{path}: no {', '.join(sorted(SUFFIXES))} file in this folder")
        return [document for file in files for document in read_documents(file)]
    documents = _json_lines(path) if path.suffix == ".jsonl" else [_read_text(path)]
    found = [document for document in documents if document.strip()]
    if not found:
        raise DataError(f"{path}: the file holds no text. Give one that holds some.")
    return found


def text_files(path: Path) -> list[Path]:
    """What is read of a path: the file itself, or the text files of a folder and of all folders in it, sorted."""
    return sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]


def read_labeled(path: str | Path) -> list[tuple[str, int]]:
    """(sentence, label) pairs of a .jsonl file with the fields `sentence` or `text`, and `label`.

    Raises:
        DataError: a line has no label, named by number.
    """
    rows = []
    for number, row in _rows(Path(path)):
        if not isinstance(row.get("label"), int):
            raise DataError(
                f"{path}, line {number}: no whole-number field 'label', which a classifier's accuracy needs"
            )
        rows.append((_field(row, Path(path), number), row["label"]))
    if not rows:
        raise DataError(f"{path}: the file holds no labeled line")
    return rows


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start} of {len(raw):,}). Give a text file.") from error
    if "\x00" in text:
        raise DataError(f"{path}: a binary file (NUL byte at {text.index(chr(0)):,}). Give a text file.")
    return text


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: a JSON object is expected, got {type(row).__name__}")
        yield number, row


def _field(row: dict[str, Any], path: Path, number: int) -> str:
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            try:
                row[name].encode()
            except UnicodeEncodeError as error:
                said = "half of a surrogate pair is no text. Write that line again."
                raise DataError(f"{path}, line {number}: {said}") from error
            return str(row[name])
    raise DataError(f"{path}, line {number}: no text field; one of {', '.join(TEXT_FIELDS)} is expected")


def _json_lines(path: Path) -> list[str]:
    return [_field(row, path, number) for number, row in _rows(path)]


def sample_batches(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    *,
    samples: int,
    length: int,
    seed: int,
    causal: bool,
    labels: Sequence[int] | None = None,
    batch_size: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Batches:
    """Seeded random sequences of the documents, for calibration.

    Causal models get windows of `length` tokens cut from the documents joined by a blank line; encoders get whole
    documents with their special tokens, cut at `length` and padded, with their labels where these are given.

    Raises:
        DataError: the text does not fill one window, or `length` is more than the model can read.
    """
    check_length(config, length)
    batch_size = batch_size or sequences_at_once(length, batch_tokens)
    order = list(documents)
    random.Random(seed).shuffle(order)
    if causal:
        ids = _joined_ids(order, tokenizer, want=4 * samples * length)
        windows = split_windows(ids, length, prefix_ids(tokenizer))
        if not windows:
            raise DataError(
                f"the text gives {len(ids):,} tokens, but one calibration window needs {length:,} "
                f"({samples} windows are wanted). Give more text, or a smaller --length."
            )
        chosen = sorted(random.Random(seed).sample(range(len(windows)), min(samples, len(windows))))
        batches = _stack([windows[i] for i in chosen], batch_size)
    else:
        batches = padded_batches(order[:samples], tokenizer, length, batch_size)
        if labels is not None:
            check_labels(config, labels)
            batches = _labeled(batches, labels, seed)
    check_ids(config, batches)
    facts = describe(batches, tokenizer, length=length, seed=seed, **passages(batches))
    if labels is not None:
        facts["labels_sha256"] = hashlib.sha256(json.dumps(list(labels)).encode()).hexdigest()
    facts["ngrams"] = sketch(tokenizer.decode(ids) for batch in batches for ids in batch["input_ids"].tolist())
    return Batches(batches=batches, facts=facts, masking=masking_of(tokenizer), batch_tokens=batch_tokens)


def masking_of(tokenizer: PreTrainedTokenizerBase) -> Masking | None:
    """How a tokenizer hides tokens, or None where it has no mask token."""
    token = getattr(tokenizer, "mask_token_id", None)
    return None if token is None else Masking(token=token, special=frozenset(tokenizer.all_special_ids))


def _labeled(batches: Sequence[Batch], labels: Sequence[int], seed: int) -> list[Batch]:
    """The batches with the labels of their sequences, which were shuffled with this seed."""
    order, at, found = list(labels), 0, list[Batch]()
    random.Random(seed).shuffle(order)
    for batch in batches:
        rows = len(batch["input_ids"])
        found.append({**batch, "labels": torch.tensor(order[at : at + rows])})
        at += rows
    return found


def check_length(config: PreTrainedConfig, length: int) -> None:
    """Raise if the model cannot read sequences of this length.

    Raises:
        DataError: with both numbers.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DataError(f"--length {length:,} is more than the {limit:,} positions of this model")


def check_ids(config: PreTrainedConfig, batches: Sequence[Batch]) -> None:
    """Raise if some token id is beyond the model's vocabulary.

    Raises:
        DataError: with both numbers.
    """
    highest = max((int(batch["input_ids"].max()) for batch in batches), default=0)
    if highest >= config.vocab_size:
        raise DataError(
            f"the tokenizer gives token id {highest:,}, but the model knows {config.vocab_size:,} tokens: they do not "
            "belong together"
        )


def check_labels(config: PreTrainedConfig, labels: Sequence[int]) -> None:
    """Raise if some label is none of the model's.

    Raises:
        DataError: with both numbers.
    """
    wrong = next((label for label in labels if not 0 <= label < config.num_labels), None)
    if wrong is not None:
        raise DataError(f"the text has label {wrong:,}, but the model knows {config.num_labels:,} labels, from 0 up")


def _joined_ids(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, want: int) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += token_ids(document + JOIN, tokenizer)
        if len(ids) >= want:
            break
    return ids


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text, without special tokens and without complaints about its length."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that this tokenizer puts before every text by itself: its BOS, or nothing."""
    alone = list(tokenizer("", verbose=False)["input_ids"])
    return alone[:1] if alone and alone[0] == tokenizer.bos_token_id else []


def split_windows(ids: Sequence[int], length: int, prefix: Sequence[int] = ()) -> list[Int[Tensor, " length"]]:
    """Non-overlapping windows of `length` ids, each beginning with the prefix; a last short piece is left out."""
    body = length - len(prefix)
    return [torch.tensor([*prefix, *ids[i : i + body]]) for i in range(0, len(ids) - body + 1, body)]


def _stack(windows: Sequence[Tensor], batch_size: int) -> list[Batch]:
    return [{"input_ids": torch.stack(list(windows[i : i + batch_size]))} for i in range(0, len(windows), batch_size)]


def padded_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, batch_size: int
) -> list[Batch]:
    """Texts with their special tokens, cut at `length`, padded to the longest of their batch."""
    batches: list[Batch] = []
    for i in range(0, len(texts), batch_size):
        encoded = tokenizer(
            list(texts[i : i + batch_size]),
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        batches.append(dict(encoded))
    return batches


def describe(batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase, **facts: Any) -> dict[str, Any]:
    """What has to be said with every number made from these batches."""
    digest = hashlib.sha256()
    tokens = sequences = 0
    for batch in batches:
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        digest.update(ids[mask.bool()].to(torch.int64).numpy().tobytes())
        tokens += int(mask.sum())
        sequences += len(ids)
    return {
        "tokens": tokens,
        "sequences": sequences,
        "tokenizer": f"{type(tokenizer).__name__} of {len(tokenizer):,} tokens",
        "sha256": digest.hexdigest(),
        **facts,
    }
