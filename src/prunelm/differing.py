"""What tells one piece of plain data from another: a checksum, and what differs, by path and in words."""

import hashlib
import json
from typing import Any

SHOWN = 3
"""Differences that a sentence names."""


def digest_of(data: Any) -> str:
    """The checksum of plain data, in whatever order its names stand."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(there: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(name, value then, value now) of everything that differs, by path."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = list(dict.fromkeys([*there, *now]))
        return [d for key in keys for d in differences(there.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if there == now else [(name, there, now)]


def in_words(differ: list[tuple[str, Any, Any]]) -> str:
    """The first of some differences, with both values."""
    shown = [f"{name} was {_short(then)} and is {_short(now)}" for name, then, now in differ[:SHOWN]]
    more = f", and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    return ", ".join(shown) + more


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
