"""What a reader must know before believing the numbers of a pruned model: on its card, on its page, at the prompt."""

from collections.abc import Iterator, Mapping
from typing import Any

TOKENS_PER_CHANNEL = 4
MULTIPLE = 8
"""Matrix kernels work on multiples of this many channels."""
CLEARLY = 0.95
"""A wider layer that takes less than this share of a layer's time is called faster."""


def doubts(pruning: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> list[str]:
    """Sentences, the gravest first; `evaluation` as in evaluation.json, where there is one."""
    unmeasured = "No quality has been measured yet: nothing here says how well this model works."
    found = list(notes(evaluation)) if evaluation else [unmeasured]
    return [*found, *_calibration(pruning), *_speed(pruning, evaluation or {"parts": {}})]


def notes(found: Mapping[str, Any]) -> list[str]:
    """What must be said beside the numbers: text that the model was calibrated on, and text for which nobody knows."""
    said: dict[str, None] = {}
    for part in found["parts"].values():
        texts = [(part["text"]["name"], part.get("overlap"))] if "text" in part else []
        texts += [(row["text"], row.get("overlap")) for row in part["results"].get("others", ())]
        for name, met in texts:
            said.update(dict.fromkeys(flags(name, met)))
    return list(said)


def flags(name: str, met: Mapping[str, Any] | None) -> Iterator[str]:
    """What must be said of a text by its name, by how much of it the model was calibrated on."""
    if not met:
        return
    if met.get("flagged"):
        yield (
            f"{name}: about {met['share']:.0%} of its 8-word passages are in the calibration text ({met['shared']} of "
            f"{met['checked']} checked). These numbers flatter the pruned model."
        )
    elif "unknown" in met and "none needed" not in met["unknown"] and "self-generated" not in met["unknown"]:
        yield f"whether {name} was calibrated on is not known: {met['unknown']}"


def _calibration(pruning: Mapping[str, Any]) -> Iterator[str]:
    read = pruning["calibration"]["criterion"]
    widest = max((site["units"] for key, site in pruning["sites"].items() if key.endswith("ffn")), default=0)
    if read.get("source") == "none needed":
        yield "Units were chosen by weights alone; no text was read."
    elif read["tokens"] < TOKENS_PER_CHANNEL * widest:
        yield (
            f"Few calibration tokens: {read['tokens']:,} for FFNs of {widest:,} channels; at least "
            f"{TOKENS_PER_CHANNEL * widest:,} are better (--samples, --length)."
        )


def _speed(pruning: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Iterator[str]:
    timed = evaluation["parts"].get("widths", {}).get("results")
    yield from _slower(timed) if timed is not None else _odd(pruning)
    ratio = evaluation["parts"].get("speed", {}).get("results", {}).get("ratio", {})
    for measure, label in (("prefill", "Prefill"), ("decode", "Decoding")):
        if measure in ratio and ratio[measure]["value"] < 1:
            yield f"{label} is not faster than the dense model here: {ratio[measure]['value']:.3f}x, measured."


def _slower(timed: Mapping[str, Any]) -> Iterator[str]:
    """Widths that were measured to be slower than a wider one, by more than rounds differ."""
    for row in timed["widths"]:
        for name in ("reading", "writing"):
            faster = [w for w in row["wider"] if w[name]["value"] < CLEARLY and (w[name]["high"] or 1) < 1]
            if faster:
                best = min(faster, key=lambda wider: wider[name]["value"])
                where = f"{row['site'].replace('ffn', 'FFN')}, {row['blocks']} block{'s' if row['blocks'] > 1 else ''}"
                yield (
                    f"Width {row['width']:,} ({where}) is slower at {name} than "
                    f"{best['width']:,} would be: that takes {best[name]['value']:.2f}x its time, measured on this "
                    "machine (--multiple-of)."
                )


def _odd(pruning: Mapping[str, Any]) -> Iterator[str]:
    cut = [site for key, site in pruning["sites"].items() if key.endswith("ffn") and len(site["kept"]) < site["units"]]
    slow = sorted({len(site["kept"]) for site in cut if len(site["kept"]) % MULTIPLE})
    if slow:
        yield (
            f"FFN widths that are no multiple of {MULTIPLE} can run slower than the next wider ones that are: "
            f"{', '.join(map(str, slow[:6]))}{' and others' if len(slow) > 6 else ''}. Part widths measures it "
            f"(--multiple-of {MULTIPLE} avoids it)."
        )
