"""Run as `python -m prunelm.verify FOLDER EXPECTED`: load a folder as a user would and compare its logits.

A stock folder is opened by `transformers` alone; one with per-block widths both by the code that it carries and by
`prunelm.load`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

TOLERANCE = 1e-3
"""Largest accepted difference of two float32 logits that differ only in the order of sums."""


def proof_inputs(vocab_size: int, length: int) -> Int[Tensor, "1 length"]:
    """Fixed token ids, spread over the vocabulary."""
    return ((torch.arange(length) * 7919 + 17) % vocab_size)[None]


def logits_gap(folder: Path, expected: Path) -> float:
    """Max |logits of the folder's model - expected logits|, both in float32, over every way to open it."""
    from safetensors.torch import load_file

    saved = load_file(expected)
    loader = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))["loader"]
    gaps = []
    ways = [_stock if loader == "transformers" else _with_prunelm]
    if list(folder.glob("modeling_*.py")):
        ways.append(_with_its_code)
    for opened in ways:
        model = opened(folder).eval()
        with torch.no_grad():
            result = model(input_ids=saved["ids"])
        found = result.logits if "logits" in result else result.last_hidden_state
        gaps.append(float((found - saved["logits"]).abs().max()))
    return max(gaps)


def _stock(folder: Path) -> Any:
    import transformers

    return getattr(transformers, _class_name(folder)).from_pretrained(folder, dtype=torch.float32)


def _with_its_code(folder: Path) -> Any:
    """What `trust_remote_code=True` gives; the code is our own, written a moment ago."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    (module,) = folder.glob("modeling_*.py")
    cls = get_class_from_dynamic_module(f"{module.stem}.{_class_name(folder)}", str(folder))
    return cls.from_pretrained(folder, dtype=torch.float32)


def _with_prunelm(folder: Path) -> Any:
    from .loading import load

    return load(folder, dtype=torch.float32)


def _class_name(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])


if __name__ == "__main__":
    print(logits_gap(Path(sys.argv[1]), Path(sys.argv[2])))
