"""What a reader of the page must know before believing its numbers."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..doubts import doubts

OVERFIT = 1.25
"""How many times the loss added on the calibration text the loss added elsewhere may be."""


def caveats(
    pruning: Mapping[str, Any], evaluation: Mapping[str, Any] | None, transfer: Mapping[str, Any] | None
) -> list[str]:
    """Sentences, the gravest first."""
    found = [*(_overfit(transfer) if transfer else ()), *doubts(pruning, evaluation)]
    if pruning["loader"] != "transformers":
        found.append(
            "Plain transformers refuses to open this folder: it opens with prunelm.load, or with the modeling file in "
            "it where there is one (trust_remote_code=True)."
        )
    return found


def _overfit(transfer: Mapping[str, Any]) -> Iterator[str]:
    cells = {(c["calibrated"], c["tested"]): math.log(c["ratio"]["value"]) for c in transfer["cells"]}
    for tested in dict.fromkeys(b for _, b in cells):
        own = cells.get((tested, tested))
        others = [loss for (a, b), loss in cells.items() if b == tested and a != tested]
        if own and others and max(others) > OVERFIT * own > 0:
            yield (
                f"It hangs on its calibration text: on {tested}, other text adds {max(others):.3f} nats per "
                f"token, calibrating on text of its own kind {own:.3f}. Calibrate on text like that which it will meet."
            )
