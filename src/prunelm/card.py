"""The model card (README.md) of a pruned checkpoint, in Hugging Face's metadata format."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .doubts import doubts


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What an evaluation says on a card: rows of a table, what to know of them, and metrics for the metadata.

    `paired`: the dense model was measured too.
    """

    rows: Sequence[Sequence[str]]
    doubts: Sequence[str]
    text: str
    paired: bool
    task: str
    metrics: Mapping[str, float]


LICENSE, PIPELINE = ("license", "license_name"), ("pipeline_tag",)
"""Metadata that a card takes over from that of the base model, and from an earlier one of its own."""
_HEAD = re.compile(r"\A---\n(.*?)^---$", re.M | re.S)
_PLAIN = re.compile(r"[\w\"'][^#\[\]{}|>&*!`]*")
"""Values that stand on their line as they are."""


def metadata(card: Path, names: Sequence[str]) -> list[str]:
    """The lines of some fields at the head of a model card, as far as there is one and it has them in plain words."""
    head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    lines = [line.partition(":") for line in head[1].splitlines()] if head is not None else []
    return [f"{name}: {value.strip()}" for name, _, value in lines if name in names and _PLAIN.fullmatch(value.strip())]


def model_card(facts: Mapping[str, Any], measured: Measured | None = None, *, head: Sequence[str] = ()) -> str:
    """Markdown that says what was removed, how, what was measured, and how to load the result.

    Args:
        facts: as in pruning.json.
        measured: what an evaluation found.
        head: further lines of metadata: the license, and what the model is for.
    """
    recipe = facts["recipe"]
    sizes = facts["parameters"]
    calibration = facts["calibration"]["criterion"]
    opens = _HOW_STOCK if facts["loader"] == "transformers" else _HOW_PRUNELM
    if facts["loader"] != "transformers" and not facts.get("modeling_file", True):
        opens = _HOW_OURS
    known = doubts(facts, None) if measured is None else measured.doubts
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(facts['base_model'], ensure_ascii=False)}",
        "tags:",
        "- prunelm",
        "- structured-pruning",
        *head,
        *(_model_index(facts, measured) if measured is not None else ()),
        "---",
        "",
        f"# {facts['base_model']}, {sizes['share_of_blocks']:.1%} of its block parameters removed",
        "",
        f"Made with PruneLM {facts['versions']['prunelm']}, recipe `{recipe['name']}`: structured pruning without "
        "retraining. `pruning.json` beside this file has every setting, and the indices of all units that were kept.",
        "",
        "| | before | after |",
        "|---|---|---|",
        f"| parameters | {sizes['before']:,} | {sizes['after']:,} |",
    ]
    lines += [f"| {name} | {before} | {after} |" for name, before, after in _widths(facts["sites"], recipe)]
    if "dropped_blocks" in facts:
        lines.append(f"| blocks dropped | | {', '.join(map(str, facts['dropped_blocks']))} |")
    if "hidden" in facts:
        lines.append(f"| hidden channels | {facts['hidden']['units']} | {len(facts['hidden']['kept'])} |")
    lines += [
        "",
        _calibrated(calibration),
        "",
        *(_measured(measured) if measured is not None else ()),
        "## Load it",
        "",
        opens,
        "",
        "## What to know",
        "",
        *(f"- {doubt}" for doubt in known),
        *([""] if known else []),
        "Pruning without training costs quality, and more of it on text unlike the calibration text. What the card of "
        "the base model says still applies; whether safety or biases changed was not examined. Measure the model on "
        "your own text before you use it, which also puts the figures on this card:",
        "",
        "```",
        "prunelm evaluate FOLDER --text YOUR_TEXT --against BASE_MODEL --parts quality --out FOLDER/evaluation.json",
        "```",
        "",
    ]
    if facts["notes"]:
        lines += ["Notes of the run:", "", *(f"- {note}" for note in facts["notes"]), ""]
    return "\n".join(lines)


def _calibrated(read: Mapping[str, Any]) -> str:
    """What text was read, if any."""
    if not read["tokens"]:
        return "No calibration text was read."
    sizes = f"{read['tokens']:,} tokens ({read['sequences']} sequences of at most {read.get('length', '?')})"
    return f"Calibrated on {sizes}, source: {read.get('source', 'unknown')}."


def _model_index(facts: Mapping[str, Any], measured: Measured) -> list[str]:
    """The results in the metadata of a Hugging Face model card; JSON is YAML too."""
    metrics = [{"type": name, "value": round(value, 6)} for name, value in measured.metrics.items()]
    result = {"task": {"type": measured.task}, "dataset": {"type": "text", "name": measured.text}, "metrics": metrics}
    name = f"{facts['base_model']}-pruned"
    return ["model-index:", f"- name: {json.dumps(name)}", "  results:", f"  - {json.dumps(result)}"]


def _measured(measured: Measured) -> list[str]:
    pair = "dense and pruned on the same text" if measured.paired else "without the dense model beside it"
    lines = ["## What it costs", "", f"Measured on {_code(measured.text)} where nothing else is said, {pair}.", ""]
    lines += ["| | dense | pruned | compared |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in measured.rows]
    return [*lines, ""]


def _cell(text: str) -> str:
    """A text in a table, whatever signs are in it."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _code(name: str) -> str:
    """A name as code."""
    plain = name.replace("`", "'")
    return f"`{plain}`"


_HOW_STOCK = """With plain `transformers`, as any other model:

```python
from transformers import AutoModelForCausalLM  # or the class that config.json names
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""

_HOW_PRUNELM = """The blocks of this model differ in width, or have a number of heads that no stock config can describe.
Plain `transformers` opens it only with the small modeling file in this folder, which narrows the stock class. Read that
file, then allow it:

```python
from transformers import AutoModelForCausalLM  # or the class that auto_map in config.json names
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

With PruneLM installed, no code from the folder has to run:

```python
import prunelm
model = prunelm.load("FOLDER")
```"""


_HOW_OURS = """This model lacks whole sublayers, or has a narrower residual stream than its class is built with, so
plain `transformers` cannot open it. PruneLM can, and runs no code from the folder:

```python
import prunelm
model = prunelm.load("FOLDER")
```"""


def _widths(sites: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What units of each kind of site are called, and how many a block had and has."""
    heads = "query heads" if recipe.get("unit") == "query" else "KV groups (a key/value head with its query heads)"
    called = {"attention": heads, "ffn": "FFN channels"}
    rows = []
    for name in dict.fromkeys(key.split(".")[1] for key in sites):
        mine = [site for key, site in sites.items() if key.split(".")[1] == name]
        kept = sorted({len(site["kept"]) for site in mine})
        units = sorted({site["units"] for site in mine})
        rows.append((f"{called.get(name, name)} per block", _span(units), _span(kept)))
    return rows


def _span(values: list[int]) -> str:
    return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"
