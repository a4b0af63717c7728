"""How long pruning takes and how much memory, as ratios to a plain forward pass measured in the same run."""

from typing import Any

from .record import measure


def main() -> None:
    """Placeholder until written."""
