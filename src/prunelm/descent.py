"""Budgets refined by what the pruned model itself says: who should give more, who should get some back.

Prices measured on the dense model assume that damage adds up, and overrate what looks harmless alone. Here every round
starts from the model as the present plan would leave it. One backward pass of its divergence from the dense model gives
the gradient R of every consumer's weight; with the Fisher matrix G of its output and the second moment C of its input,
changing its repaired weight from W to V is expected to cost

    <R, V - W> + c/2 tr(G (V - W) C (V - W)^T)

where a bias counts as the weight of one more channel that is always 1, and a knapsack within a trust region chooses the
next plan, which is kept only if its measured divergence is less. The coupling c makes up for errors of different sites,
which add up to more than independent ones would.

Sites whose smallest step is larger than the trust region (a KV group of three) leap: when a round with leaps brings too
little, they stay as they are from then on, and the others go on in small steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from .fisher import output_fisher
from .journal import Journal
from .knapsack import knapsack
from .placement import exact
from .plan import Budget, Counts
from .progress import Progress, silent
from .rehearsal import Rehearsal
from .search import Found
from .sensitivity import Divergence, Slope, rehearsed
from .sites import Site

TRUST = 1 / 8
"""Share of a site's units that a plan may move by in one round, at first."""
LEAST_TRUST = 1 / 64
COUPLING = 2.5
"""What is expected of a round agreed with what was measured at this coupling (see docs/log.md)."""
POOR, GOOD = 0.5, 0.75
"""A round that brings less than this share of what was expected halves the trust; more than that doubles it again."""
Damage = dict[str, Float[Tensor, " option"]]


@dataclass(frozen=True, kw_only=True)
class _State:
    """Where a search is: the plan, its divergence, how far to go next, and whether coarse sites stay as they are.

    `tried` counts the plans measured so far.
    """

    removed: dict[str, int]
    divergence: float
    step: int
    trust: float = TRUST
    settled: bool = False
    tried: int = 1


def descend(
    sites: Sequence[Site],
    budget: Budget,
    start: tuple[Counts, int],
    rehearsal: Rehearsal,
    divergence: Divergence,
    curves: Mapping[str, Float[Tensor, " count"]],
    *,
    rounds: int,
    seed: int = 0,
    journal: Journal | None = None,
    progress: Progress = silent,
) -> Found:
    """The plan with the least measured divergence that some rounds of descent from `start` find.

    Args:
        sites: that may lose units.
        budget: what must go.
        start: the plan to begin with, and one step of it.
        rehearsal: open, over the same sites.
        divergence: measured on held-out tokens.
        curves: relative error with 0, 1, 2... units removed, for the prices that the found plan implies.
        rounds: plans to measure at most, besides the start.
        seed: of the labels that the Fisher matrices at the start are taken from.
        journal: where rounds are written as they end, and read from when they were made before.
        progress: told about every round.
    """
    journal = journal or Journal()
    removed = {site.key: site.n_units - start[0][site.key] for site in sites}
    first = journal.entry(lambda: {"divergence": rehearsed(removed, rehearsal, divergence)})["divergence"]
    state = _State(removed=removed, divergence=first, step=start[1])
    view = _View(sites, budget, rehearsal, divergence, _fisher_at(removed, rehearsal, divergence, sites, seed))
    for n in range(rounds):
        progress("searching", n, rounds)
        now = _State(**journal.entry(lambda now=state: asdict(_round(view, now))))  # type: ignore[misc]
        stuck = now.trust < LEAST_TRUST or replace(now, tried=state.tried) == state
        state = now
        if stuck:
            break
    progress("searching", rounds, rounds)
    return Found(
        counts={site.key: site.n_units - state.removed[site.key] for site in sites},
        step=state.step,
        target=budget.target,
        divergence=state.divergence,
        start=first,
        tried=state.tried,
        prices=_implied(view, state, curves),
    )


class _View:
    """The model as a plan would leave it, and what its gradient says of every site."""

    def __init__(
        self,
        sites: Sequence[Site],
        budget: Budget,
        rehearsal: Rehearsal,
        divergence: Divergence,
        fisher: Mapping[str, Float[Tensor, "out out"]],
    ) -> None:
        self.sites, self.budget, self.rehearsal, self.divergence = sites, budget, rehearsal, divergence
        self.fisher = fisher
        self.options = {site.key: budget.options(site) for site in sites}
        self._at: dict[str, int] | None = None
        self._slopes: dict[str, Slope] = {}

    def slopes(self, removed: dict[str, int]) -> dict[str, Slope]:
        """The gradient at a plan; asked for again, it is not computed again."""
        if self._at != removed:
            self.rehearsal.apply(removed)
            self.rehearsal.forget()
            self._slopes, self._at = self.divergence.slopes(self.sites), dict(removed)
        return self._slopes

    def damage(self, state: _State) -> Damage:
        """The expected change of the divergence at every option of the trust region; the others cost infinitely much.

        What the gradient and the curvature expect is computed at the ends of the region, and joined by parabolas.
        """
        slopes, found = self.slopes(state.removed), Damage()
        for site in self.sites:
            options, at = self.options[site.key], state.removed[site.key]
            low, high = within(options, at, state.trust * site.n_units)
            if state.settled and coarse(options, site.n_units):
                low = high = at
            ends = {o: self._change(site, slopes[site.key], at, o) for o in {low, high} - {at}}
            inside = torch.tensor([low <= o <= high for o in options])
            slope = line_through(at, {o: end[0] for o, end in ends.items()}, options)
            curvature = bowl_through(at, {o: end[1] for o, end in ends.items()}, options)
            found[site.key] = (slope + COUPLING * curvature).where(inside, torch.inf)
        return found

    @torch.no_grad()
    def _change(self, site: Site, slope: Slope, at: int, to: int) -> tuple[float, float]:
        """What the gradient and the curvature expect of a site that goes from `at` removed units to `to`."""
        moments = self.rehearsal.moments[site.key]
        (new, new_bias), (old, old_bias) = (self.rehearsal.layer(site.key, n) for n in (to, at))
        change = exact(new - old)
        along = (exact(slope.weight) * change).sum()
        bent = change @ moments.second_moment
        if new_bias is not None and old_bias is not None:
            shift = exact(new_bias - old_bias)
            mean = moments.mean
            assert slope.bias is not None
            along += exact(slope.bias) @ shift
            curved = bent @ change.T + 2 * torch.outer(shift, change @ mean) + torch.outer(shift, shift)
        else:
            curved = bent @ change.T
        return float(along), float((self.fisher[site.key] * curved).sum() / 2)


def _round(view: _View, state: _State) -> _State:
    """One proposal, measured: the next state, with the plan as it was where the proposal is no better."""
    damage = view.damage(state)
    counts, step = knapsack(view.sites, view.budget, damage)
    removed = {site.key: site.n_units - counts[site.key] for site in view.sites}
    if removed == state.removed:
        return replace(state, trust=state.trust / 2)
    hoped = sum(float(damage[key][view.options[key].index(n)]) for key, n in removed.items())
    now = rehearsed(removed, view.rehearsal, view.divergence)
    change, trust, settled, tried = now - state.divergence, state.trust, state.settled, state.tried + 1
    leaps = any(coarse(view.options[s.key], s.n_units) and removed[s.key] != state.removed[s.key] for s in view.sites)
    if change >= POOR * hoped and leaps:
        settled = True
    elif change >= POOR * hoped:
        trust /= 2
    elif change < GOOD * hoped:
        trust = min(2 * trust, TRUST)
    if change >= 0:
        return replace(state, trust=trust, settled=settled, tried=tried)
    return _State(removed=removed, divergence=now, step=step, trust=trust, settled=settled, tried=tried)


def coarse(options: Sequence[int], units: int) -> bool:
    """Whether one step of a site is more than a plan may move by: few heads, where no trust makes the steps smaller."""
    return len(options) > 1 and options[1] - options[0] > TRUST * units


def _fisher_at(
    removed: Mapping[str, int], rehearsal: Rehearsal, divergence: Divergence, sites: Sequence[Site], seed: int
) -> dict[str, Float[Tensor, "out out"]]:
    """Fisher matrices of the model as the first plan would leave it, which answers less sharply than the dense one."""
    rehearsal.apply(removed)
    return output_fisher(divergence.stream.model, divergence.whole, sites, seed=seed)


def _implied(view: _View, state: _State, curves: Mapping[str, Float[Tensor, " count"]]) -> dict[str, float]:
    """What a unit of relative error costs at a plan, by site key: the prices that other sizes are planned with."""
    damage, prices = view.damage(replace(state, settled=False)), {}
    for site in view.sites:
        options = view.options[site.key]
        low, high = within(options, state.removed[site.key], state.trust * site.n_units)
        cost = damage[site.key]
        error = float(curves[site.key][high] - curves[site.key][low])
        prices[site.key] = float(cost[options.index(high)] - cost[options.index(low)]) / max(error, 1e-12)
    known = sorted(price for price in prices.values() if price > 0)
    least = known[len(known) // 2] / 100 if known else 1.0
    return {key: max(price, least) for key, price in prices.items()}


def within(options: Sequence[int], at: int, reach: float) -> tuple[int, int]:
    """The farthest options on both sides of one that are no more than `reach` away, or else its neighbours."""
    n = options.index(at)
    low = min((o for o in options if at - reach <= o < at), default=options[max(n - 1, 0)])
    high = max((o for o in options if at < o <= at + reach), default=options[min(n + 1, len(options) - 1)])
    return low, high


def line_through(at: int, ends: Mapping[int, float], options: Sequence[int]) -> Float[Tensor, " option"]:
    """The polynomial that is 0 at `at` and meets the values at one or two ends: smooth, so that plans are not torn."""
    points, x = {at: 0.0, **ends}, torch.tensor(list(options), dtype=torch.float64)
    found = torch.zeros_like(x)
    for here, value in points.items():
        weight = torch.ones_like(x)
        for other in points:
            if other != here:
                weight *= (x - other) / (here - other)
        found += value * weight
    return found


def bowl_through(at: int, ends: Mapping[int, float], options: Sequence[int]) -> Float[Tensor, " option"]:
    """0 at `at`, and on each side the parabola from there that meets the value at that end: never negative."""
    found = torch.zeros(len(options), dtype=torch.float64)
    for n, option in enumerate(options):
        for end, value in ends.items():
            if (option - at) * (end - at) > 0:
                found[n] = value * ((option - at) / (end - at)) ** 2
    return found
