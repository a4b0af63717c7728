"""Text as people really type it: seeded noise of four kinds, at several strengths."""

import random
import re
import string
from collections.abc import Callable

NEIGHBORS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
"""Rows of a keyboard; a slip hits the key beside the one that was meant."""
_SENTENCE = re.compile(r"(?<=[.!?])(\s+)")


def typos(text: str, strength: float, seed: int) -> str:
    """A share `strength` of the letters is doubled, left out, swapped with the next, or hit on the key beside it."""
    chance = random.Random(seed)
    found, i = [], 0
    while i < len(text):
        letter = text[i]
        if not letter.isalpha() or chance.random() >= strength:
            found.append(letter)
        else:
            kind = chance.randrange(4)
            if kind == 0:
                found.append(letter * 2)
            elif kind == 1 and i + 1 < len(text):
                found.append(text[i + 1] + letter)
                i += 1
            elif kind == 2:
                found.append(_beside(letter, chance))
        i += 1
    return "".join(found)


def _beside(letter: str, chance: random.Random) -> str:
    for row in NEIGHBORS:
        at = row.find(letter.lower())
        if at >= 0:
            near = chance.choice([row[k] for k in (at - 1, at + 1) if 0 <= k < len(row)])
            return near.upper() if letter.isupper() else near
    return letter


def casing(text: str, strength: float, seed: int) -> str:
    """A share `strength` of the words is written in capitals or without any."""
    chance = random.Random(seed)

    def change(found: re.Match[str]) -> str:
        if chance.random() >= strength:
            return found[0]
        return found[0].upper() if chance.random() < 0.5 else found[0].lower()

    return re.sub(r"\w+", change, text)


def punctuation(text: str, strength: float, seed: int) -> str:
    """A share `strength` of the punctuation marks is left out."""
    chance = random.Random(seed)
    return "".join(c for c in text if c not in string.punctuation or chance.random() >= strength)


def shuffled(text: str, strength: float, seed: int) -> str:
    """A share `strength` of the sentences changes places with one another, paragraph by paragraph."""
    chance = random.Random(seed)
    return "\n".join(_shuffled_line(line, strength, chance) for line in text.split("\n"))


def _shuffled_line(line: str, strength: float, chance: random.Random) -> str:
    pieces = _SENTENCE.split(line)
    sentences, spaces = pieces[::2], pieces[1::2]
    moved = [i for i in range(len(sentences)) if chance.random() < strength]
    places = moved[:]
    chance.shuffle(places)
    order = list(range(len(sentences)))
    for place, sentence in zip(places, moved, strict=True):
        order[place] = sentence
    return "".join(sentences[k] + space for k, space in zip(order, [*spaces, ""], strict=True))


Noise = Callable[[str, float, int], str]
"""A text, the strength, a seed."""
NOISES: dict[str, tuple[Noise, tuple[float, ...]]] = {
    "typos": (typos, (0.01, 0.05, 0.1)),
    "casing": (casing, (0.1, 0.5, 1.0)),
    "punctuation": (punctuation, (0.1, 0.5, 1.0)),
    "shuffled sentences": (shuffled, (0.25, 0.5, 1.0)),
}
"""Every kind of noise with the strengths that a suite tries."""
