"""What is said of a folder that was written."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import out, print_json, tell


def show_reports(reports: Mapping[Path, Any], as_json: bool, told: Sequence[str] = ()) -> None:
    """What was written, per folder, and what a user must know and was not told before; by the process that wrote it."""
    from ..distributed import is_writer

    if not is_writer():
        return
    found = []
    for folder, report in reports.items():
        written = json.loads((folder / "pruning.json").read_text(encoding="utf-8"))
        found.append({**written, "seconds": report.seconds, "out": str(folder)})
        if as_json:
            continue
        tell([note for note in written["notes"] if note not in told])
        sizes = written["parameters"]
        out.print(
            f"{sizes['before']:,} -> {sizes['after']:,} parameters: {sizes['share_of_blocks']:.2%} of the blocks, "
            f"{sizes['share_of_model']:.2%} of the model removed, in {report.seconds:.0f} s"
        )
        out.print(f"{folder}: loaded in a fresh process, same logits. {how_to_load(written['loader'], folder)}")
    if as_json:
        print_json(found if len(found) > 1 else found[0])


def how_to_load(loader: str, folder: Path) -> str:
    """The line that opens a folder."""
    if loader == "transformers":
        return f"Load it: AutoModelForCausalLM.from_pretrained({str(folder)!r}), or the class that its config names."
    if not list(folder.glob("modeling_*.py")):
        return f"No stock class has its shapes. Load it: prunelm.load({str(folder)!r})."
    return (
        f"Its blocks differ in width. Load it: prunelm.load({str(folder)!r}), or from_pretrained with "
        "trust_remote_code=True, which runs the modeling file in that folder."
    )
