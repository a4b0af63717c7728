"""What a reader must know before believing the numbers of a pruned model."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..suite.summary import notes

TOKENS_PER_CHANNEL = 4
MULTIPLE = 8
"""Matrix kernels work on multiples of this many channels."""
CLEARLY = 0.95
"""A wider layer that takes less than this share of a layer's time is called faster."""
OVERFIT = 1.25
"""How many times the loss added on the calibration text the loss added elsewhere may be."""


def caveats(
    pruning: Mapping[str, Any], evaluation: Mapping[str, Any] | None, transfer: Mapping[str, Any] | None
) -> list[str]:
    """Sentences, the gravest first."""
    found = (
        list(notes(evaluation))
        if evaluation
        else ["No quality has been measured yet: nothing here says how well this model works."]
    )
    found += _overfit(transfer) if transfer else ()
    found += _calibration(pruning)
    found += _speed(pruning, evaluation or {"parts": {}})
    if pruning["loader"] != "transformers":
        found.append(
            "Plain transformers refuses to open this folder: it opens with prunelm.load, or with the modeling file in "
            "it where there is one (trust_remote_code=True)."
        )
    return found


def _overfit(transfer: Mapping[str, Any]) -> Iterator[str]:
    import math

    cells = {(c["calibrated"], c["tested"]): math.log(c["ratio"]["value"]) for c in transfer["cells"]}
    for tested in dict.fromkeys(b for _, b in cells):
        own = cells.get((tested, tested))
        others = [loss for (a, b), loss in cells.items() if b == tested and a != tested]
        if own and others and max(others) > OVERFIT * own > 0:
            yield (
                f"It hangs on its calibration text: on {tested}, other text adds {max(others):.3f} nats per "
                f"token, calibrating on text of its own kind {own:.3f}. Calibrate on text like that which it will meet."
            )


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
            faster = [w for w in row["wider"] if w[name]["value"] < CLEARLY and w[name]["high"] < 1]
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
