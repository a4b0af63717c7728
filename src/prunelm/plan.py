"""Budgets as contracts, and plans: which units stay."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import BudgetError
from .sites import Site

Counts = dict[str, int]
"""How many units stay, by site key."""


def check_sparsity(sparsity: float) -> None:
    """Raise unless 0 < sparsity < 1.

    Raises:
        BudgetError: says what a sparsity is.
    """
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise BudgetError(
            f"sparsity must be in [0, 1), got {sparsity}. 0.2 removes a fifth of the prunable parameters."
        )
    if sparsity == 0:
        raise BudgetError("sparsity 0 removes nothing. Give a share of the parameters, as in --sparsity 0.2.")


def parameters_of(sparsity: float, total: int) -> int:
    """Whole parameters in a share of some, rounded down; 0.7 of 2,880 are 2,016, though floats multiply to less."""
    exact = sparsity * total
    return math.floor(exact + 2 * math.ulp(exact))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many parameters must go, and what a width may be.

    Attributes:
        target: parameters to remove; a plan removes in (target - one step, target].
        total: prunable parameters of the sites that may lose units.
        asked_of: what the user's sparsity is a share of; `total` where it is 0.
        multiple_of: kept FFN channels are a multiple of this.
        min_units: units that every site keeps at least, per KV head where units are query heads.
        attention_share: sparsity of attention relative to the overall one; FFN pays the rest.
        floor: units that a site must lose at least, by site key: what a larger model of the same family has lost.
        ceiling: units that a site may lose at most, by site key: what a smaller model of the same family will lose.
        legal: whether the programs that must open the result accept this many kept units of a site.
    """

    target: int
    total: int
    asked_of: int = 0
    multiple_of: int = 1
    min_units: int = 1
    attention_share: float = 1.0
    floor: Mapping[str, int] = field(default_factory=dict)
    ceiling: Mapping[str, int] = field(default_factory=dict)
    legal: Callable[[Site, int], bool] = field(default=lambda _site, _kept: True)

    @property
    def sparsity(self) -> float:
        """The target as a share of the parameters in reach."""
        return self.target / self.total

    def share(self, parameters: int) -> str:
        """Some parameters as the sparsity to ask for: the smallest with four digits that reaches them."""
        return f"{math.ceil(parameters / (self.asked_of or self.total) * 10_000) / 10_000:.4f}"

    def share_below(self, parameters: int) -> str:
        """Some parameters as a sparsity: the largest with four digits that does not exceed them."""
        return f"{math.floor(parameters / (self.asked_of or self.total) * 10_000) / 10_000:.4f}"

    def options(self, site: Site) -> list[int]:
        """Numbers of units that may be removed from a site, ascending from 0, its floor, or what a program needs.

        They end at its ceiling, or at `min_units`.
        """
        least = self.min_units * site.strata
        step = self.multiple_of if site.spec.probabilities is None else site.strata
        kept = [k for k in range(site.n_units, least - 1, -1) if k == site.n_units or k % step == 0]
        floor, most = self.floor.get(site.key, 0), self.ceiling.get(site.key, site.n_units)
        return [o for o in (site.n_units - k for k in kept if self.legal(site, k)) if floor <= o <= most] or [floor]

    def step(self, site: Site) -> int:
        """Parameters between two neighbouring options of a site."""
        options = self.options(site)
        return max((b - a for a, b in pairwise(options)), default=0) * site.cost


@dataclass(frozen=True, kw_only=True)
class Nested:
    """What the other sizes of a family leave a plan: `floor` and `ceiling` of its `Budget`, and what may stay.

    `among` are the units that the size before kept; every unit may stay of sites that it does not name. Without it, the
    units of all sizes are ranked by one look at the dense model.
    """

    floor: Mapping[str, int] = field(default_factory=dict)
    ceiling: Mapping[str, int] = field(default_factory=dict)
    among: Mapping[str, Int[Tensor, " kept"]] | None = None


def prunable(sites: Sequence[Site]) -> int:
    """Parameters that belong to some unit of the sites."""
    return sum(site.cost * site.n_units for site in sites)


@dataclass(frozen=True)
class Plan:
    """Which units stay, per site: sorted indices into the site's units."""

    kept: Mapping[str, Int[Tensor, " kept"]]

    def removed(self, sites: Sequence[Site]) -> int:
        """Parameters that the plan removes."""
        return sum((s.n_units - len(self.kept[s.key])) * s.cost for s in sites if s.key in self.kept)

    def check(self, sites: Sequence[Site], budget: Budget, slack: int) -> None:
        """Raise unless the plan is well formed and removes in (target - slack, target].

        Raises:
            BudgetError: with both numbers.
        """
        for site in sites:
            kept = self.kept.get(site.key)
            if kept is None:
                continue
            if len(kept) == 0 and not budget.min_units:
                continue
            if len(kept) == 0 or not bool((kept.diff() > 0).all()) or int(kept[-1]) >= site.n_units:
                raise BudgetError(f"{site.key}: kept units must be sorted, unique, and below {site.n_units}")
        removed = self.removed(sites)
        if not budget.target - slack < removed <= budget.target:
            raise BudgetError(
                f"the plan removes {removed:,} parameters, the budget says {budget.target:,} less at most one step "
                f"of {slack:,}"
            )


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What was decided before a run: how many units each site keeps, and of some sites which."""

    counts: Counts
    kept: Mapping[str, Int[Tensor, " kept"]] = field(default_factory=dict)

    def scores(self, sites: Sequence[Site]) -> dict[str, Float[Tensor, " unit"]]:
        """Scores by which exactly the units that are named stay, for the sites that name some."""
        found = {}
        for site in sites:
            if site.key in self.kept:
                found[site.key] = torch.zeros(site.n_units, dtype=torch.float64)
                found[site.key][self.kept[site.key]] = 1.0
        return found


def top_units(scores: Float[Tensor, " unit"], keep: int, strata: int = 1) -> Int[Tensor, " kept"]:
    """The highest-scoring units, the same number from every stratum, sorted; of equal scores the lower index goes."""
    per = len(scores) // strata
    picks = []
    for s in range(strata):
        order = torch.argsort(scores[s * per : (s + 1) * per], stable=True)
        picks.append(order[per - keep // strata :] + s * per)
    return torch.cat(picks).sort().values


def order_of(scores: Float[Tensor, " unit"], strata: int = 1) -> Int[Tensor, " unit"]:
    """All units, those that go last first: `top_units` keeps the first ones, whatever number of them stays."""
    ranks = scores.reshape(strata, -1).argsort(stable=True, dim=1).flip(1)
    starts = torch.arange(strata, device=scores.device) * ranks.shape[1]
    return (ranks + starts[:, None]).T.flatten()


def largest_option(options: Sequence[int], at_most: float) -> int:
    """The largest option that is not above `at_most`, or else the smallest."""
    return max((option for option in options if option <= at_most + 1e-9), default=min(options))
