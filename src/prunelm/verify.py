"""Run as `python -m prunelm.verify FOLDER EXPECTED`: load a folder as a user would and compare its logits.

A stock folder is opened by `transformers` alone; only a folder that says so is opened by `prunelm.load`.
"""

import json
import sys
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

TOLERANCE = 1e-3
"""Largest accepted difference of two float32 logits that differ only in the order of sums."""


def proof_inputs(vocab_size: int, length: int) -> Int[Tensor, "1 length"]:
    """Fixed token ids, spread over the vocabulary."""
    return ((torch.arange(length) * 7919 + 17) % vocab_size)[None]


def logits_gap(folder: Path, expected: Path) -> float:
    """Max |logits of the folder's model - expected logits|, both in float32."""
    import transformers
    from safetensors.torch import load_file

    saved = load_file(expected)
    loader = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))["loader"]
    if loader == "transformers":
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    else:
        from .loading import load

        model = load(folder, dtype=torch.float32)
    with torch.no_grad():
        result = model(input_ids=saved["ids"])
    found = result.logits if "logits" in result else result.last_hidden_state
    return float((found - saved["logits"]).abs().max())


if __name__ == "__main__":
    print(logits_gap(Path(sys.argv[1]), Path(sys.argv[2])))
