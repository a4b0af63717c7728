"""Run as `python -m prunelm.footprint MODEL DTYPE`: the peak memory of a process that loads a model and uses it."""

import json
import resource
import sys

import torch

from .loading import find_model, load_model
from .speed import decode_seconds, prefill_seconds

UNIT = 1 if sys.platform == "darwin" else 1024


def footprint(model: str, dtype: str, *, trust_remote_code: bool = False) -> dict[str, int]:
    """Peak resident bytes before the model was read, when it was loaded, and when it had been used."""
    found = {"before": _peak()}
    loaded = load_model(
        find_model(model, trust_remote_code=trust_remote_code, device="cpu"), dtype=getattr(torch, dtype)
    )
    found["loaded"] = _peak()
    if loaded.can_generate():
        decode_seconds(loaded, 64, 8)
    else:
        prefill_seconds(loaded, 64)
    found["used"] = _peak()
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


if __name__ == "__main__":
    trust = "--trust-remote-code" in sys.argv
    print(json.dumps(footprint(sys.argv[1], sys.argv[2], trust_remote_code=trust)))
