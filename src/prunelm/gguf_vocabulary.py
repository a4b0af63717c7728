"""A folder's tokenizer in GGUF's words."""

from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from .errors import CheckpointError
from .loading import read_json

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = ("ByteLevel", True)
_KNOWN = {
    (_BYTES,): "gpt-2",
    (("Digits", True), _BYTES): "smollm",
    (("Split", _WORDS + r"\p{N}" + _REST), ("ByteLevel", False)): "qwen2",
    (("Split", _WORDS + r"\p{N}{1,3}" + _REST), ("ByteLevel", False)): "llama-bpe",
}
"""How a text is cut before merging, by the name that llama.cpp has for it."""


def add_vocabulary(writer: GGUFWriter, folder: Path, size: int) -> None:
    """Write the tokens, merges and special tokens of a folder's tokenizer.json.

    Raises:
        CheckpointError: there is no tokenizer.json, or it is of a kind that cannot be said here.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no tokenizer.json in it. {_OTHERWISE}")
    data = read_json(path)
    cut = _cut(path, data)
    tokens, types = _tokens(data, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


_OTHERWISE = "Give the dense model's .gguf file with --parent: its vocabulary is taken then."


def _cut(path: Path, data: dict[str, Any]) -> str:
    """The name of the way in which the tokenizer cuts text."""
    model, before = data.get("model") or {}, data.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or not model.get("merges"):
        kind = "SentencePiece" if model.get("byte_fallback") else str(model.get("type"))
        raise CheckpointError(f"{path}: a byte-level BPE tokenizer with merges is needed, this is {kind}. {_OTHERWISE}")
    steps = before.get("pretokenizers", [before])
    found = _KNOWN.get(tuple((step.get("type"), _how(step)) for step in steps))
    if found is None or data.get("normalizer") not in (None, {"type": "NFC"}):
        kinds = ", ".join(str(step.get("type")) for step in steps)
        raise CheckpointError(f"{path}: llama.cpp's name for its way to cut text ({kinds}) is not known. {_OTHERWISE}")
    return found


def _how(step: dict[str, Any]) -> Any:
    """What makes one step of cutting differ from others of its type."""
    if step.get("type") == "Split":
        return (step.get("pattern") or {}).get("Regex")
    return step.get("use_regex", step.get("individual_digits"))


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """All tokens in order, with unused ones where the embedding has more rows, and their kinds."""
    names = {int(number): token for token, number in data["model"]["vocab"].items()}
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    for token in data.get("added_tokens", ()):
        names[token["id"]] = token["content"]
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if max(names) >= size:
        raise CheckpointError(f"the tokenizer has token {max(names)}, the model {size} embeddings. Check the folder.")
    tokens = [names.get(number, f"[PAD{number}]") for number in range(size)]
    return tokens, [int(kinds.get(number, TokenType.UNUSED)) for number in range(size)]
