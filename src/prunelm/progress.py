"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that tells nobody."""


def named(progress: Progress, name: str) -> Progress:
    """The same progress, of one of several models or texts: every stage says which."""
    return lambda stage, done, total: progress(f"{stage} {name}", done, total)
