"""Results as JSON files: with the versions that made them, and written in one rename."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from .writing import write_whole


def versions() -> dict[str, str]:
    """The versions that numbers hang on."""
    return {
        "prunelm": version("prunelm"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write_results(target: Path, data: Mapping[str, Any]) -> None:
    """Write measured results in one rename, so that an interrupt leaves those from before.

    Raises:
        OutputError: the file cannot be written.
    """
    write_whole(target, json.dumps(data, indent=1, allow_nan=False) + "\n")
