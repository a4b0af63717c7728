"""Budgets refined by what they do together: whole plans are tried, and their divergence measured.

Prices measured one site at a time assume that damage adds up. Here prices are bent, the knapsack is solved again, and
the plan that comes out is judged by the divergence of the whole model with every site pruned and repaired.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from .knapsack import knapsack
from .plan import Budget, Counts
from .progress import Progress, silent
from .reconstructions import Reconstruction
from .sensitivity import Divergence, repaired_in_place
from .sites import Site
from .survey import Survey

STEPS = (0.8, 0.4, 0.2)
"""Sizes of the bends, coarse to fine, as natural logarithms of a price."""
BENDS = ("attention", "depth", "middle", "evenness")
Prices = Mapping[str, Float[Tensor, " option"]]
Judge = Callable[[Counts], float]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best plan of a search for a target: its divergence and that of the start, and how many were tried."""

    counts: Counts
    step: int
    target: int
    divergence: float
    start: float
    tried: int
    bends: dict[str, float] = field(default_factory=dict)


def judge_of(
    divergence: Divergence, sites: Sequence[Site], survey: Survey, repair: Reconstruction, ridge: float
) -> Judge:
    """A function (counts) -> divergence of the whole model with every site pruned and repaired, nothing kept.

    Repairs are solved from the moments of the dense model, so no plan needs a pass over the calibration text.
    """

    def judge(counts: Counts) -> float:
        with ExitStack() as open_sites:
            for site in sites:
                removed = site.n_units - counts[site.key]
                if removed:
                    key = site.key
                    open_sites.enter_context(
                        repaired_in_place(site, survey.scores[key], survey.moments[key], removed, repair, ridge)
                    )
            return divergence.measure(0, divergence.entering)

    return judge


def refine(
    sites: Sequence[Site],
    budget: Budget,
    prices: Prices,
    judge: Judge,
    *,
    candidates: int,
    known: dict[tuple[int, ...], float] | None = None,
    progress: Progress = silent,
) -> Found:
    """The plan with the least measured divergence among those of bent prices; the plan of the prices as they are first.

    Coordinate descent, coarse to fine, over four bends: attention against FFN, early against late blocks, middle
    against outer blocks, and how evenly damage is spread. Deterministic; a plan met before is not measured again.

    Args:
        sites: that may lose units.
        budget: what must go.
        prices: damage at each option of each site.
        judge: measures the divergence of a plan.
        candidates: plans to measure at most, the start included.
        known: divergences of plans measured before, by their counts in the order of `sites`; new ones are added.
        progress: told about every plan measured.

    Raises:
        BudgetError: the sites cannot lose that much.
    """
    trials = _Trials(sites, judge, candidates, {} if known is None else known, progress)
    best = dict.fromkeys(BENDS, 0.0)
    counts, step = knapsack(sites, budget, prices)
    start = least = trials.measure(counts)
    for trial in _bends(best):
        if trials.spent:
            break
        tried, tried_step = knapsack(sites, budget, bent(sites, prices, trial))
        now = trials.measure(tried)
        if now < least:
            counts, step, least = tried, tried_step, now
            best.update(trial)
    progress("searching", candidates, candidates)
    return Found(
        counts=counts,
        step=step,
        target=budget.target,
        divergence=least,
        start=start,
        tried=len(trials.seen),
        bends=best,
    )


def pick(
    sites: Sequence[Site],
    plans: Sequence[tuple[Counts, int]],
    judge: Judge,
    *,
    target: int,
    candidates: int,
    known: dict[tuple[int, ...], float] | None = None,
    progress: Progress = silent,
) -> Found:
    """The plan with the least measured divergence among the first `candidates` of some, which come best guess first."""
    trials = _Trials(sites, judge, candidates, {} if known is None else known, progress)
    measured = [(trials.measure(counts), n) for n, (counts, _) in enumerate(plans[:candidates])]
    progress("searching", candidates, candidates)
    least, n = min(measured)
    counts, step = plans[n]
    return Found(counts=counts, step=step, target=target, divergence=least, start=measured[0][0], tried=len(measured))


class _Trials:
    """Plans measured so far; none is measured twice."""

    def __init__(
        self,
        sites: Sequence[Site],
        judge: Judge,
        candidates: int,
        known: dict[tuple[int, ...], float],
        progress: Progress,
    ) -> None:
        self.sites, self.judge, self.candidates, self.known, self.progress = sites, judge, candidates, known, progress
        self.seen: list[tuple[int, ...]] = []

    @property
    def spent(self) -> bool:
        return len(self.seen) >= self.candidates

    def measure(self, counts: Counts) -> float:
        key = tuple(counts[site.key] for site in self.sites)
        if key not in self.known:
            self.known[key] = self.judge(counts)
        if key not in self.seen:
            self.seen.append(key)
            self.progress("searching", len(self.seen), self.candidates)
        return self.known[key]


def _bends(best: dict[str, float]) -> Iterator[dict[str, float]]:
    """Bends to try, around whatever is best by the time each is asked for."""
    for size in STEPS:
        for name in BENDS:
            before = best[name]
            yield {**best, name: before + size}
            if best[name] == before:
                yield {**best, name: before - size}


def bent(sites: Sequence[Site], prices: Prices, bends: Mapping[str, float]) -> dict[str, Float[Tensor, " option"]]:
    """Prices with attention, later, or middle blocks made dearer by e^bend, and damage raised to the power e^bend.

    A power above 1 makes large damage dearer than the same amount in small pieces, so plans become more even.
    """
    last = max(site.block for site in sites) or 1
    scale = torch.stack([prices[site.key][-1] for site in sites]).mean().clamp_min(1e-300)
    found = {}
    for site in sites:
        t = 2 * site.block / last - 1
        factor = bends["depth"] * t + bends["middle"] * (0.5 - t * t)
        if site.spec.probabilities is not None:
            factor += bends["attention"]
        power = torch.tensor(bends["evenness"]).exp().double()
        found[site.key] = (prices[site.key] / scale) ** power * torch.tensor(factor).exp().double()
    return found
