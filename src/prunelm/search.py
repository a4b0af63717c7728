"""Plans chosen by what they do together: whole plans are tried, and the divergence of each is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .journal import Journal
from .plan import Counts
from .progress import Progress, silent

Judge = Callable[[Counts], float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan of a search for a target: its divergence and that of the start, and how many were measured.

    `prices`: what a unit of relative error costs in each site, where the search learned it.
    """

    counts: Counts
    step: int
    target: int
    divergence: float
    start: float
    tried: int
    prices: dict[str, float] = field(default_factory=dict)


def pick(
    plans: Sequence[tuple[Counts, int]],
    judge: Judge,
    *,
    target: int,
    candidates: int,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Found:
    """The plan with the least measured divergence among the first `candidates` of some, which come best guess first."""
    journal = journal or Journal()
    measured = []
    for n, (counts, _) in enumerate(plans[:candidates]):
        progress("searching", n, min(candidates, len(plans)))
        entry = journal.entry(lambda counts=counts: {"divergence": judge(counts)})  # type: ignore[misc]
        measured.append((entry["divergence"], n))
    progress("searching", len(measured), len(measured))
    least, n = min(measured)
    counts, step = plans[n]
    return Found(counts=counts, step=step, target=target, divergence=least, start=measured[0][0], tried=len(measured))
