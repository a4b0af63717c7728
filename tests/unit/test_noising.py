"""Noise is seeded, as strong as asked, and of its kind only."""

import re
from collections import Counter

import pytest

from conftest import pseudo_english
from prunelm.noising import NOISES, casing, punctuation, shuffled, typos

TEXT = pseudo_english(20_000, seed=5)


@pytest.mark.parametrize("name", NOISES)
def test_noise_is_seeded_and_grows(name: str) -> None:
    apply, strengths = NOISES[name]
    assert apply(TEXT, 0.0, 0) == TEXT
    assert apply(TEXT, strengths[0], 3) == apply(TEXT, strengths[0], 3) != apply(TEXT, strengths[0], 4)
    differ = [sum(a != b for a, b in zip(apply(TEXT, s, 0).split(), TEXT.split(), strict=False)) for s in strengths]
    assert differ == sorted(differ)
    assert differ[0] > 0


def test_casing_and_punctuation_change_nothing_else() -> None:
    assert casing(TEXT, 1.0, 0).lower() == TEXT.lower()
    words = casing("Aa bB", 1.0, 0).split()
    assert all(word.isupper() or word.islower() for word in words)
    assert punctuation(TEXT, 1.0, 0) == re.sub(r"[.?]", "", TEXT)
    half = punctuation(TEXT, 0.5, 0)
    marks = len(re.findall(r"[.?]", TEXT))
    assert len(TEXT) - len(half) == pytest.approx(marks / 2, rel=0.15)


def test_shuffled_sentences_are_the_same_sentences() -> None:
    text = "One is here. Two is there! Three? Four.\nFive stays in its line. Six too."
    made = shuffled(text, 1.0, 1)
    assert made != text
    for before, after in zip(text.split("\n"), made.split("\n"), strict=True):
        split = [re.split(r"(?<=[.!?])\s+", line) for line in (before, after)]
        assert Counter(split[0]) == Counter(split[1])
        assert len(before) == len(after)


def test_typos_hit_about_as_many_letters_as_asked() -> None:
    letters = "a" * 10_000
    made = typos(letters, 0.1, 0)
    # A quarter each: doubled, swapped with the next (the same letter here), left out, hit beside.
    assert sum(c in "s" for c in made) == pytest.approx(250, abs=80)
    assert len(made) == pytest.approx(10_000, abs=80)
    assert typos("1 + 2", 1.0, 0) == "1 + 2"
