"""Inputs for fuzzing: small edits of whole files, as JSON or as bytes, and bytes that are nothing at all."""

import copy
import json
import struct
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st

Edit = tuple[str, int, Any]
NUMBERS = (0, 1, -1, 10**7, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**30)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from(NUMBERS)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("", ".", "..", "../x", "/etc/passwd", "link/secret.safetensors", "a\x00b", "0.ffn", "NaN"))
)
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
_PLACES = st.integers(0, 2**20)
JSON_EDITS = st.lists(
    st.tuples(st.sampled_from(("value", "value", "delete", "add", "deep")), _PLACES, _VALUES), min_size=1, max_size=3
)
BYTE_EDITS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), _PLACES, st.integers(0, 7)),
        st.tuples(st.just("cut"), _PLACES, st.none()),
        st.tuples(st.just("insert"), _PLACES, st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("number"), _PLACES, st.sampled_from([n % 2**64 for n in NUMBERS])),
        st.tuples(st.just("repeat"), _PLACES, st.integers(1, 64)),
    ),
    min_size=1,
    max_size=4,
)


def damaged_json(sample: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Files like a JSON file: values replaced, taken away, added, nested deeply; or damaged as bytes."""
    text = json.dumps(sample).encode()
    edited = JSON_EDITS.map(lambda edits: json.dumps(edited_json(sample, edits)).encode())
    return st.one_of(edited, edited, damaged_bytes(text))


def other_sizes(sample: Mapping[str, Any]) -> st.SearchStrategy[bytes]:
    """Files like a JSON file, some of whose whole numbers are others."""
    names = sorted(name for name, value in sample.items() if type(value) is int)
    sizes = st.dictionaries(
        st.sampled_from(names), st.sampled_from(NUMBERS) | st.integers(1, 10**9), min_size=1, max_size=3
    )
    return sizes.map(lambda found: json.dumps({**sample, **found}).encode())


def damaged_bytes(sample: bytes) -> st.SearchStrategy[bytes]:
    """Files like a file: bits flipped, bytes put in, numbers overwritten, cut short; or any short bytes."""
    edited = BYTE_EDITS.map(lambda edits: edited_bytes(sample, edits))
    return st.one_of(
        edited, edited, edited, st.binary(max_size=64), st.binary(max_size=64).map(lambda b: sample[:8] + b)
    )


def edited_json(sample: Mapping[str, Any], edits: list[Edit]) -> Any:
    """A copy of some data with edits made one after the other."""
    data: Any = {"": copy.deepcopy(sample)}
    for kind, place, value in edits:
        holders = list(_holders(data))
        holder, key = holders[place % len(holders)]
        if kind == "delete" and holder is not data:
            del holder[key]
        elif kind == "add" and isinstance(holder[key], dict):
            holder[key][str(value)[:8]] = value
        elif kind == "deep":
            for _ in range(place % 400):
                value = [value]
            holder[key] = value
        else:
            holder[key] = value
    return data[""]


def _holders(data: Any) -> Any:
    """Every (list or object, key) at which there is a value."""
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _holders(data[key])


def edited_bytes(sample: bytes, edits: list[Edit]) -> bytes:
    """Some bytes with edits made one after the other; half of the edits fall into the first 256 bytes."""
    data = bytearray(sample)
    for kind, place, value in edits:
        at = place // 2 % max(1, min(len(data), 256) if place % 2 else len(data))
        if kind == "flip" and data:
            data[at] ^= 1 << value
        elif kind == "cut":
            del data[at:]
        elif kind == "insert":
            data[at:at] = value
        elif kind == "number":
            data[at : at + 8] = struct.pack("<Q", value)
        elif kind == "repeat":
            data[at:at] = data[at : at + value] * 3
    return bytes(data)
