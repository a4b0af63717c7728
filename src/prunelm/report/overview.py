"""The table that a page of several models begins with."""

from collections.abc import Sequence

from ..suite.summary import digits
from .gathering import Gathered

UNKNOWN = "not measured"


def short_names(found: Sequence[Gathered]) -> dict[str, str]:
    """Names without the folder that all of them share."""
    folders = {one.name.rpartition("/")[0] for one in found}
    return {one.name: one.name.rpartition("/")[2] if len(folders) == 1 else one.name for one in found}


def overview(found: Sequence[Gathered]) -> list[list[str]]:
    """A row per model, the dense one first where it was measured; first of all the head of the table.

    The recipe has a column where there are several, and what was measured where it was for some.
    """
    short = short_names(found)
    several = len({one.pruning["recipe"]["name"] for one in found}) > 1
    metrics = {quality["metric"]: None for one in found if (quality := one.part("quality")) and "value" in quality}
    head = ["model", "recipe", "parameters", "removed", " or ".join(metrics) or "quality", "KL", "prefill"]
    models = [_row(one, short[one.name]) for one in found]
    known = [k for k in range(len(head)) if any(row[k] != UNKNOWN for row in models)]
    known = [k for k in known if several or head[k] != "recipe"]
    return [[row[k] for k in known] for row in (head, *_dense(found), *models)]


def _dense(found: Sequence[Gathered]) -> list[list[str]]:
    """The row of the dense model, where all models were measured beside the same one on the same text."""
    known = [(one.part("quality") or {}).get("dense") for one in found]
    bases = {(one.pruning["base_model"], one.pruning["parameters"]["before"]) for one in found}
    values = {dense["value"] for dense in known if dense}
    if len(values) != 1 or len(bases) != 1:
        return []
    _, parameters = bases.pop()
    return [["dense", "", f"{parameters:,}", "0.0%", digits(values.pop(), 4), "0", "1.00x"]]


def _row(one: Gathered, name: str) -> list[str]:
    quality, speed = one.part("quality") or {}, one.part("speed") or {}
    sizes, kl, prefill = one.pruning["parameters"], quality.get("kl"), speed.get("ratio", {}).get("prefill")
    return [
        name,
        one.pruning["recipe"]["name"],
        f"{sizes['after']:,}",
        f"{sizes['share_of_blocks']:.1%}",
        digits(quality["value"], 4) if "value" in quality else UNKNOWN,
        digits(kl["value"], 3) if kl else UNKNOWN,
        f"{prefill['value']:.2f}x" if prefill else UNKNOWN,
    ]
