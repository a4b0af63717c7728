"""Budgets in the user's units on SmolLM2, said as on the command line, and what was then measured.

Small calibrations, because it is the budgets that are tested here, not the quality. Perplexities are on C4 documents
that calibrate nothing and decided nothing.
"""

import contextlib
import io
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from prunelm.cli import main as command
from prunelm.demo import model_file
from prunelm.exporting import export
from prunelm.layer_times import ratio_in_turns
from prunelm.limits import Speedup, limit_of
from prunelm.loading import find_model, load_model
from prunelm.progress import silent
from prunelm.quantizing import quantized_rows
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.storage import cache_bytes_of
from prunelm.workflow.evaluating import evaluate

from .quality import C4, c4_part, dequantized, pruned_by, written
from .record import measure, needed

SMALL = "--samples 5 --length 512"
ASKED = {
    "params": f"--params 110M --recipe goa-budget {SMALL}",
    "params per block": f"--params 110M --recipe flap {SMALL}",
    "fit": f"--fit 120MB@q8_0+2k --recipe goa-budget {SMALL}",
    "max-ppl": f"--max-ppl +20% --recipe wanda-sp {SMALL}",
    "speedup": f"--speedup 1.3@256 --recipe wanda-sp {SMALL}",
}
ROUNDS = 11
FORMATS = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def main() -> None:
    """Every budget, and bytes at equal quality."""
    if not needed(C4):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        dense = dequantized(folder / "dense")
        texts = {"text": written(folder / "c4.jsonl", c4_part(0, 90))}
        texts["held"] = written(folder / "c4-held-out.jsonl", c4_part(90, 95))
        for name, options in ASKED.items():
            measure("budgets", name, lambda n=name, o=options: _asked(dense, n, o, texts, folder))
    equal_bytes()


def equal_bytes() -> None:
    """The dense model and two pruned ones in several formats: bytes, and perplexity on held-out C4."""
    if not needed(C4):
        return
    with tempfile.TemporaryDirectory() as scratch:
        dense = dequantized(Path(scratch) / "dense")
        held = written(Path(scratch) / "c4-held-out.jsonl", c4_part(90, 95))
        for sparsity in (0.0, 0.1, 0.2):
            recipe = Recipe.load("obs", sparsity=sparsity, samples=32, length=512) if sparsity else None
            measure("equal-bytes", f"obs {sparsity}" if recipe else "dense", lambda r=recipe: _weighed(dense, r, held))


def _weighed(dense: Path, recipe: Recipe | None, held: Path) -> dict[str, Any]:
    """Bytes and perplexity in every format."""
    model, tokenizer, entry = pruned_by(recipe, dense, c4_part(0, 90))
    windows: dict[str, Any] = {"length": 512, "max_tokens": 4096}
    rows = quantized_rows(model, tokenizer, held, FORMATS, progress=silent, **windows)
    kept = {name: entry[name] for name in ("parameters", "share_of_blocks") if name in entry}
    return {**kept, **windows, "formats": rows}


def _asked(dense: Path, name: str, options: str, texts: dict[str, Path], scratch: Path) -> dict[str, Any]:
    """Prune by the command line and measure what was asked for."""
    out = scratch / name.replace(" ", "-")
    held = ["--held-out-text", str(texts["held"])] if "ppl" in name else []
    _run("prune", str(dense), str(out), *shlex.split(options), "--text", str(texts["text"]), *held)
    facts = json.loads((out / "pruning.json").read_text())
    entry = {"command": f"prune {options}", "asked": facts["asked"], "parameters": facts["parameters"]}
    measured = {"fit": _file, "max-ppl": _perplexity, "speedup": _speed}
    found = measured[name](dense, out, facts["asked"], texts) if name in measured else {}
    return {**entry, "measured": found}


def _run(*words: str) -> None:
    """The command line, in this process."""
    before, sys.argv = sys.argv, ["prunelm", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            command()
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"prunelm {shlex.join(words)} failed") from stop
    finally:
        sys.argv = before


def _file(_dense: Path, out: Path, asked: dict[str, Any], _texts: dict[str, Path]) -> dict[str, Any]:
    """Bytes of the GGUF file and of the cache."""
    made = export(out, out / "model.gguf", type=asked["format"], parent=model_file())
    model = load_model(find_model(out))
    cache = cache_bytes_of(find_sites(model), {}, asked["context"])
    return {"file": made.bytes, "cache": cache, "bytes": made.bytes + cache}


def _perplexity(dense: Path, out: Path, asked: dict[str, Any], texts: dict[str, Path]) -> dict[str, Any]:
    """What `prunelm evaluate` says of the written folder on the same tokens."""
    windows: dict[str, Any] = {"length": asked["length"], "max_tokens": asked["windows"] * asked["length"]}
    before, after = (evaluate(model, texts["held"], **windows).value for model in (dense, out))
    return {"dense": before, "perplexity": after, "ratio": after / before}


def _speed(dense: Path, out: Path, asked: dict[str, Any], _texts: dict[str, Path]) -> dict[str, Any]:
    """Speed of the written model and the dense one, in turns."""
    limit = limit_of(speedup=asked["speedup"])
    assert isinstance(limit, Speedup)
    ratio = ratio_in_turns([load_model(find_model(path)) for path in (dense, out)], limit, ROUNDS)
    return {"speedup": ratio, "off": ratio / asked["factor"] - 1}
