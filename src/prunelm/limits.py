"""Budgets in the user's own units: parameters, bytes, perplexity, speed; read from what was typed."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import BudgetError
from .storage import format_named

_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_BYTES = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**n for n, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**n for n, letter in enumerate("kmgt", 1)},
}
_CONTEXT = {"": 1, "k": 1024, "m": 1024**2}
_FACTOR = 100


@dataclass(frozen=True, kw_only=True)
class AtMost:
    """At most so many parameters in all."""

    said: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """At most so many bytes: of the weights in a format and, with a context, of its keys and values in f16."""

    said: str
    bytes: int
    format: str
    context: int


@dataclass(frozen=True, kw_only=True)
class MaxPerplexity:
    """A perplexity on held-out text that must not be exceeded: a number, or a share above the dense model's."""

    said: str
    value: float
    relative: bool

    def limit(self, dense: float) -> float:
        """The perplexity itself, given the dense model's."""
        return dense * (1 + self.value) if self.relative else self.value


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """A measured gain in speed: of prompts of `length` tokens, `batch` at once, or of single tokens (`decode`)."""

    said: str
    factor: float
    length: int = 512
    batch: int = 1
    decode: bool = False


Limit = AtMost | Fit | MaxPerplexity | Speedup


def limit_of(**said: Any) -> Limit | None:
    """The one limit that was given, by its option: `params`, `fit`, `max_ppl` or `speedup`; None if there is none.

    Raises:
        BudgetError: it cannot be understood, or there are two.
    """
    given = {name: value for name, value in said.items() if value is not None}
    check_one(given)
    readers: dict[str, Callable[[str], Limit]] = {
        "params": _params,
        "fit": _fit,
        "max_ppl": _max_ppl,
        "speedup": _speedup,
    }
    return next((readers[name](str(value).strip()) for name, value in given.items()), None)


def said_as(limit: Limit | None) -> dict[str, str]:
    """What `limit_of` takes to give the limit again."""
    names = {AtMost: "params", Fit: "fit", MaxPerplexity: "max_ppl", Speedup: "speedup"}
    return {} if limit is None else {names[type(limit)]: limit.said}


def check_one(given: dict[str, Any]) -> None:
    """Raise if a size is given in two ways.

    Raises:
        BudgetError: names them.
    """
    if len(given) > 1:
        named = " and ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
        raise BudgetError(f"{named} are {len(given)} budgets, and a model has one size: give one of them.")


def _params(said: str) -> AtMost:
    number = _number(said, _THOUSANDS)
    if number is None:
        raise BudgetError(f"--params must be a number of parameters, as in 1.0B, 350M or 1000000, got {said!r}.")
    return AtMost(said=said, parameters=math.floor(number))


def _fit(said: str) -> Fit:
    match = re.fullmatch(r"([^@+]+)(?:@([^@+]+))?(?:\+([^@+]+))?", said)
    size = _number(match[1], _BYTES) if match else None
    context = _number(match[3], _CONTEXT) if match and match[3] else 0
    if match is None or size is None or context is None:
        raise BudgetError(
            f"--fit must be a size, a format and a context, as in 8GB@q4_k_m+8k or 500MiB@q8_0, got {said!r}."
        )
    return Fit(said=said, bytes=math.floor(size), format=format_named(match[2] or "f16"), context=int(context))


def _max_ppl(said: str) -> MaxPerplexity:
    match = re.fullmatch(r"(\+?)\s*([0-9.]+)\s*(%?)", said)
    value = _number(match[2], {"": 1}) if match else None
    if match is None or value is None or bool(match[1]) != bool(match[3]):
        raise BudgetError(
            f"--max-ppl must be a share above the dense model's perplexity, as in +5%, or a perplexity, as in 18.5; "
            f"got {said!r}."
        )
    relative = bool(match[3])
    return MaxPerplexity(said=said, value=value / 100 if relative else value, relative=relative)


def _speedup(said: str) -> Speedup:
    match = re.fullmatch(r"([0-9.]+)x?(?:@(?:(decode)|(\d+)(?:x(\d+))?))?", said)
    factor = _number(match[1], {"": 1}) if match else None
    if match is None or factor is None or not 1 < factor < _FACTOR:
        raise BudgetError(
            "--speedup must be a factor above 1, as in 1.5, with the prompt that it is of where it is not 512 tokens: "
            f"1.5@2048, 1.5@512x4 (four at once), 1.5@decode; got {said!r}."
        )
    sizes = {name: int(text) for name, text in (("length", match[3]), ("batch", match[4])) if text}
    if not all(sizes.values()):
        raise BudgetError(f"--speedup {said}: a prompt has at least one token, and a batch one prompt.")
    return Speedup(said=said, factor=factor, decode=bool(match[2]), **sizes)


def _number(text: str, units: dict[str, int]) -> float | None:
    """A positive number with one of the units, or None."""
    match = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].lower() not in units:
        return None
    number = float(match[1].replace("_", "").replace(",", "")) * units[match[2].lower()]
    return number if 0 < number < math.inf else None
