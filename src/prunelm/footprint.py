"""Run as `python -m prunelm.footprint MODEL DTYPE DEVICE`: the peak memory of loading a model and using it."""

import json
import sys

import torch

from .loading import find_model, load_model
from .memory import resident_peak
from .speed import decode_seconds, prefill_seconds


def footprint(model: str, dtype: str, device: str = "cpu", **access: bool) -> dict[str, int]:
    """Peak bytes before the model was read, when it was loaded, and when it had been used.

    Resident memory on the CPU; on a GPU of CUDA what was allocated there. `access`: see `prunelm.prune`.
    """
    source = find_model(model, device=device, **access)
    found = {"before": _peak(source.device)}
    loaded = load_model(source, dtype=getattr(torch, dtype))
    found["loaded"] = _peak(source.device)
    if loaded.can_generate():
        decode_seconds(loaded, 64, 8)
    else:
        prefill_seconds(loaded, 64)
    found["used"] = _peak(source.device)
    return found


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak() or 0


if __name__ == "__main__":
    allowed = {name: f"--{name.replace('_', '-')}" in sys.argv for name in ("trust_remote_code", "allow_pickle")}
    model, dtype, device = sys.argv[1:4]
    print(json.dumps(footprint(model, dtype, device, **allowed)))
