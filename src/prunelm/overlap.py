"""Whether two texts share passages: hashed word n-grams, few enough to be kept beside a pruned model."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

WORDS = 8
"""Words in an n-gram: long enough not to be met by chance."""
MOST = 1024
BYTES = 5
FLAGGED = 0.01
"""Share of an evaluation text's n-grams that may be in the calibration text before the result is flagged."""
FEWEST = 30
"""N-grams that must be checked before a text counts as not seen: a tenth of it in common shows with 95 %."""


def sketch(texts: Iterable[str]) -> dict[str, Any]:
    """At most 1,024 hashed 8-grams of some texts: all whose hash is a multiple of `modulus`, a power of two.

    Words are runs of letters and digits, lower case. Which n-grams are kept hangs on their hash alone, so two texts
    can be compared by those that both would have kept. 5 bytes a hash, in base64; words cannot be read back from it.
    """
    hashes = sorted({h for text in texts for h in _hashes(text)})
    modulus = 1
    while len(hashes) > MOST:
        modulus *= 2
        hashes = [h for h in hashes if h % modulus == 0]
    packed = b"".join(h.to_bytes(BYTES, "big") for h in hashes)
    return {"words": WORDS, "modulus": modulus, "hashes": base64.b64encode(packed).decode()}


def overlap(texts: str | Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """The share of some texts' 8-grams that a sketched text holds too, estimated from those that the sketch could keep.

    `unknown` says why nothing is known: none was shared, but fewer than 30 could be checked.
    """
    raw = base64.b64decode(known["hashes"])
    there = {int.from_bytes(raw[i : i + BYTES], "big") for i in range(0, len(raw), BYTES)}
    texts = [texts] if isinstance(texts, str) else texts
    mine = [h for text in texts for h in _hashes(text) if h % known["modulus"] == 0]
    shared = sum(h in there for h in mine)
    share = shared / len(mine) if mine else 0.0
    found: dict[str, Any] = {"share": share, "checked": len(mine), "shared": shared, "flagged": share > FLAGGED}
    if shared == 0 and len(mine) < FEWEST:
        few = f"only {len(mine)} of its 8-word passages could be checked, at least {FEWEST} are needed"
        found["unknown"] = f"{few}; score more text"
    return found


def apart(text: str, other: str) -> str:
    """The paragraphs of a text, less those that have a part in an 8-gram that the other text holds too."""
    known = set(_hashes(other))
    paragraphs = text.split("\n\n")
    while shared := _shared(paragraphs, known):
        paragraphs = [paragraph for k, paragraph in enumerate(paragraphs) if k not in shared]
    return "\n\n".join(paragraphs)


def _shared(paragraphs: Sequence[str], known: Set[int]) -> set[int]:
    """Which paragraphs have a part in a known 8-gram; it may reach over several."""
    owners = [k for k, paragraph in enumerate(paragraphs) for _ in _words(paragraph)]
    met = (i for i, found in enumerate(_hashes("\n\n".join(paragraphs))) if found in known)
    return {owner for i in met for owner in owners[i : i + WORDS]}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hashes(text: str) -> Iterator[int]:
    for gram in _grams(_words(text)):
        yield int.from_bytes(hashlib.blake2b(" ".join(gram).encode(), digest_size=BYTES).digest(), "big")


def _grams(words: Sequence[str]) -> Iterator[Sequence[str]]:
    for i in range(len(words) - WORDS + 1):
        yield words[i : i + WORDS]
