"""The table that a page of several models begins with."""

from collections.abc import Sequence

from ..suite.summary import digits
from .gathering import Gathered

UNKNOWN = "not measured"


def short_names(found: Sequence[Gathered]) -> dict[str, str]:
    """Names without the folder that all of them share."""
    folders = {one.name.rpartition("/")[0] for one in found}
    return {one.name: one.name.rpartition("/")[2] if len(folders) == 1 else one.name for one in found}


def measured_on(one: Gathered) -> str:
    """The text and the windows of part `quality`."""
    part = (one.evaluation or {"parts": {}})["parts"].get("quality")
    if part is None:
        return UNKNOWN
    settings, text = part["settings"], part.get("text", {}).get("name", "some text")
    most = f" up to {settings['max_tokens']:,}" if settings.get("max_tokens") else ""
    return f"{text}, windows of {settings['length']:,} tokens{most}"


def overview(found: Sequence[Gathered]) -> list[list[str]]:
    """A row per model, the dense one first where it was measured; first of all the head of the table.

    The recipe has a column where there are several, the text where texts or windows differ, and what was measured where
    it was for some.
    """
    short = short_names(found)
    texts = {measured_on(one) for one in found} - {UNKNOWN}
    several = len({one.pruning["recipe"]["name"] for one in found}) > 1
    metrics = dict.fromkeys(shown[0] for one in found if (shown := _measure(one)) is not None)
    names = ["model", "recipe", "parameters", "removed", " or ".join(metrics) or "quality", "KL", "prefill"]
    head = [*names, "measured on"]
    models = [_row(one, short[one.name]) for one in found]
    known = [k for k in range(len(head)) if any(row[k] != UNKNOWN for row in models)]
    known = [k for k in known if (several or head[k] != "recipe") and (len(texts) > 1 or head[k] != "measured on")]
    return [[row[k] for k in known] for row in (head, *_dense(found), *models)]


def _dense(found: Sequence[Gathered]) -> list[list[str]]:
    """The row of the dense model, where all models were measured beside the same one on the same text."""
    known = [(one.part("quality") or {}).get("dense") for one in found]
    bases = {(one.pruning["base_model"], one.pruning["parameters"]["before"]) for one in found}
    values = {dense["value"] for dense in known if dense}
    texts = {measured_on(one) for one in found} - {UNKNOWN}
    if len(values) != 1 or len(bases) != 1 or len(texts) != 1:
        return []
    _, parameters = bases.pop()
    return [["dense", "", f"{parameters:,}", "0.0%", digits(values.pop(), 4), "0", "1.00x", ""]]


def _measure(one: Gathered) -> tuple[str, str] | None:
    """What quality is measured by, and how much of it there is; a bare encoder has only its cosine to dense."""
    quality = one.part("quality") or {}
    if "value" in quality:
        return quality["metric"], digits(quality["value"], 4)
    return ("cosine", digits(quality["cosine"]["value"], 4)) if "cosine" in quality else None


def _row(one: Gathered, name: str) -> list[str]:
    quality, speed = one.part("quality") or {}, one.part("speed") or {}
    measure = _measure(one)
    sizes, kl, prefill = one.pruning["parameters"], quality.get("kl"), speed.get("ratio", {}).get("prefill")
    return [
        name,
        one.pruning["recipe"]["name"],
        f"{sizes['after']:,}",
        f"{sizes['share_of_blocks']:.1%}",
        measure[1] if measure is not None else UNKNOWN,
        digits(kl["value"], 3) if kl else UNKNOWN,
        f"{prefill['value']:.2f}x" if prefill else UNKNOWN,
        measured_on(one),
    ]
