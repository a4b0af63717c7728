"""Whether a text that a model is evaluated on was in its calibration, by what its pruning.json keeps of that."""

from typing import Any

from ..loading import Source
from ..overlap import overlap


def calibration_overlap(source: Source, text: str) -> dict[str, Any] | None:
    """How much of a text the model was calibrated on, by the n-grams in its pruning.json; None without such a file."""
    plan = source.plan()
    if plan is None:
        return None
    calibration = plan["calibration"]["criterion"]
    if "ngrams" not in calibration:
        return {"unknown": f"pruning.json has no n-grams of its calibration text ({calibration.get('source')})"}
    return overlap(text, calibration["ngrams"])
