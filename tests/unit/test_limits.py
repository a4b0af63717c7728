"""Budgets in the user's units: what is typed is read exactly, and what cannot be read is answered in one line."""

import pytest

from prunelm.errors import BudgetError
from prunelm.limits import AtMost, Fit, MaxPerplexity, Speedup, limit_of


def test_nothing_given_is_no_limit():
    assert limit_of(params=None, fit=None) is None


@pytest.mark.parametrize(
    ("said", "parameters"), [("1.0B", 1_000_000_000), ("350m", 350_000_000), ("1,000", 1000), (110_000, 110_000)]
)
def test_parameters(said, parameters):
    assert limit_of(params=said) == AtMost(said=str(said), parameters=parameters)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("8GB@q4_k_m+8k", (8_000_000_000, "q4_k_m", 8192)),
        ("500MiB@fp16", (500 * 1024**2, "f16", 0)),
        ("1.5gib+100", (3 * 1024**3 // 2, "f16", 100)),
        ("123456@Q8_0", (123_456, "q8_0", 0)),
    ],
)
def test_bytes(said, found):
    assert limit_of(fit=said) == Fit(said=said, bytes=found[0], format=found[1], context=found[2])


def test_perplexity_is_a_number_or_a_share_above_the_dense_model():
    assert limit_of(max_ppl="18.5") == MaxPerplexity(said="18.5", value=18.5, relative=False)
    share = limit_of(max_ppl="+5%")
    assert isinstance(share, MaxPerplexity)
    assert share.limit(20.0) == pytest.approx(21.0)


def test_speed_is_of_a_prompt_or_of_single_tokens():
    assert limit_of(speedup=1.5) == Speedup(said="1.5", factor=1.5)
    assert limit_of(speedup="1.3@2048x4") == Speedup(said="1.3@2048x4", factor=1.3, length=2048, batch=4)
    assert limit_of(speedup="2x@decode") == Speedup(said="2x@decode", factor=2.0, decode=True)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"params": "many"}, "--params must be a number of parameters, as in 1.0B"),
        ({"params": "-3"}, "--params must be"),
        ({"params": "0"}, "--params must be"),
        ({"fit": "8GB@q5+8k"}, r"unknown format 'q5'. Did you mean 'q5_1'\? Known: f32, f16"),
        ({"fit": "big"}, "--fit must be a size, a format and a context, as in 8GB@q4_k_m"),
        ({"fit": "8GB@q8_0+many"}, "--fit must be"),
        ({"max_ppl": "5%"}, r"--max-ppl must be a share above .* as in \+5%"),
        ({"max_ppl": "+5"}, "--max-ppl must be"),
        ({"speedup": "0.9"}, "--speedup must be a factor above 1"),
        ({"speedup": "1.5@0"}, "at least one token"),
        ({"params": "1B", "fit": "1GB"}, "--params 1B and --fit 1GB are 2 budgets, and a model has one size"),
    ],
)
def test_what_cannot_be_read(given, says):
    with pytest.raises(BudgetError, match=says):
        limit_of(**given)


@pytest.mark.parametrize("said", [{"params": "9" * 400}, {"fit": "9" * 400 + "GB"}, {"fit": "8GB+" + "9" * 400}])
def test_numbers_beyond_all_bounds(said):
    with pytest.raises(BudgetError, match="must be a"):
        limit_of(**said)
