"""Text that was calibrated on is found again by hashed n-grams, whatever its length; other text is not."""

import base64

import pytest

from conftest import pseudo_english
from prunelm.doubts import flags
from prunelm.overlap import BYTES, MOST, apart, overlap, sketch

SEEN, OTHER = pseudo_english(60_000, seed=1), pseudo_english(60_000, seed=2)


def test_a_sketch_is_small_and_finds_its_own_text() -> None:
    known = sketch([SEEN])
    kept = len(base64.b64decode(known["hashes"])) // BYTES
    assert MOST / 2 <= kept <= MOST
    assert known["modulus"] > 1
    found = overlap(SEEN, known)
    assert found["share"] == 1
    assert found["flagged"]
    assert found["checked"] >= kept


def test_other_text_is_not_flagged() -> None:
    found = overlap(OTHER, sketch([SEEN]))
    assert found["share"] == 0
    assert not found["flagged"]
    assert found["checked"] > 300
    assert "unknown" not in found


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_the_share_is_estimated(share: float) -> None:
    mixed = SEEN[: int(60_000 * share)] + OTHER[int(60_000 * share) :]
    found = overlap(mixed, sketch([SEEN]))
    assert found["share"] == pytest.approx(share, abs=0.06)
    assert found["flagged"]


def test_case_and_punctuation_do_not_hide_a_copy() -> None:
    assert overlap(SEEN.upper().replace(".", " ;"), sketch([SEEN]))["share"] == 1


def test_short_texts() -> None:
    known = sketch(["too short"])
    assert known["hashes"] == ""
    found = overlap("also too short", known)
    assert (found["share"], found["checked"], found["flagged"]) == (0.0, 0, False)
    assert found["unknown"].startswith("only 0 of its 8-word passages could be checked, at least 30")
    (said,) = flags("few.txt", found)
    assert said.startswith("whether few.txt was calibrated on is not known: only 0 of its")
    # One passage in common is enough to flag a text, however short.
    known = sketch([SEEN[:2_000]])
    copied = overlap(SEEN[:100], known)
    assert copied["checked"] < 30
    assert copied["flagged"]
    assert "unknown" not in copied


def test_paragraphs_that_repeat_are_left_out() -> None:
    mine = [OTHER[k : k + 400] for k in range(0, 4_000, 400)]
    inside = f"{OTHER[5_000:5_300]} {SEEN[100:300]} {OTHER[5_300:5_400]}"
    words = SEEN.split()
    halves = (" ".join(words[100:104]), " ".join(words[104:108]))  # a passage that goes on in the next paragraph
    text = "\n\n".join([*mine[:4], inside, *mine[4:], *halves])
    found = apart(text, SEEN)
    assert found == "\n\n".join(mine)
    assert overlap(found, sketch([SEEN]))["shared"] == 0
    assert apart(SEEN, SEEN) == ""
