"""Run as `python -m prunelm.verify FOLDER EXPECTED [streamed]`: load a folder as a user would and compare its logits.

A stock folder is opened by `transformers` alone; one with per-block widths both by the code that it carries and by
`prunelm.load`. With `streamed` the same classes build their shapes only, and one block at a time gets its weights.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

TOLERANCE = 1e-3
"""Largest accepted difference of two float32 logits that differ only in the order of sums."""


PROOF_TOKENS = 48


def proof_inputs(vocab_size: int, length: int) -> Int[Tensor, "1 length"]:
    """Fixed token ids, spread over the vocabulary."""
    return ((torch.arange(length) * 7919 + 17) % vocab_size)[None]


def logits_gap(folder: Path, expected: Path, *, streamed: bool = False) -> float:
    """Max |logits of the folder's model - expected logits|, both in float32, over every way to open it."""
    from safetensors.torch import load_file

    saved = load_file(expected)
    loader = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))["loader"]
    ways = [_stock if loader == "transformers" else _with_prunelm]
    if list(folder.glob("modeling_*.py")):
        ways.append(_with_its_code)
    run = _streamed if streamed else _whole
    return max(float((run(way, folder, saved["ids"]) - saved["logits"]).abs().max()) for way in ways)


def streamed_logits(folder: Path, ids: Int[Tensor, "1 length"]) -> Tensor:
    """What a stock folder computes, its blocks passing through memory one by one."""
    return _streamed(_stock, folder, ids)


Way = Callable[[Path, bool], Any]
"""Gives the folder's model, or with True only its shapes."""


@torch.no_grad()
def _whole(way: Way, folder: Path, ids: Tensor) -> Tensor:
    result = way(folder, False).eval()(input_ids=ids)
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


def _streamed(way: Way, folder: Path, ids: Tensor) -> Tensor:
    from .loading import find_model
    from .shelf import Shelf

    return Shelf(find_model(folder), model=way(folder, True)).logits(ids)


def _stock(folder: Path, shapes: bool) -> Any:
    import transformers

    return _built(getattr(transformers, _class_name(folder)), folder, shapes)


def _with_its_code(folder: Path, shapes: bool) -> Any:
    """What `trust_remote_code=True` gives; the code is our own, written a moment ago."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    (module,) = folder.glob("modeling_*.py")
    return _built(get_class_from_dynamic_module(f"{module.stem}.{_class_name(folder)}", str(folder)), folder, shapes)


def _built(cls: Any, folder: Path, shapes: bool) -> Any:
    from accelerate import init_empty_weights

    if not shapes:
        return cls.from_pretrained(folder, dtype=torch.float32)
    config = cls.config_class.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        return cls(config)


def _with_prunelm(folder: Path, shapes: bool) -> Any:
    from .loading import find_model, load, skeleton

    return skeleton(find_model(folder), buffers=True) if shapes else load(folder, dtype=torch.float32)


def _class_name(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0])


if __name__ == "__main__":
    print(logits_gap(Path(sys.argv[1]), Path(sys.argv[2]), streamed=sys.argv[3:] == ["streamed"]))
