"""What a search keeps or drops as one: a unit, several FFN channels, a sublayer, or a whole block."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .plan import Budget, Counts
from .policy import Policy
from .sites import Site, by_block


@dataclass(frozen=True, kw_only=True)
class Variables:
    """`of`: the variable of every unit, by site key; `cost` in parameters; `layers`: whose scores can be compared.

    `pool`: which target each variable counts towards; `targets`: parameters to remove from each pool; `blocks`: the
    block that each variable is, where variables are blocks.
    """

    of: Mapping[str, Int[Tensor, " unit"]]
    cost: Float[Tensor, " variable"]
    layers: Sequence[Int[Tensor, " _"]]
    pool: Int[Tensor, " variable"]
    targets: Sequence[int]
    blocks: Sequence[int] = ()

    def means(self, scores: Mapping[str, Float[Tensor, " unit"]]) -> Float[Tensor, " variable"]:
        """The mean score of each variable's units."""
        total, count = torch.zeros_like(self.cost), torch.zeros_like(self.cost)
        for key, of in self.of.items():
            total.index_add_(0, of, scores[key].double())
            count.index_add_(0, of, torch.ones(len(of), dtype=torch.float64))
        return total / count


def variables_of(
    sites: Sequence[Site],
    budget: Budget,
    metric: Mapping[str, Float[Tensor, " unit"]],
    policy: Policy,
    counts: Counts | None = None,
) -> Variables:
    """The variables of a policy over some sites.

    Args:
        sites: that may lose units.
        budget: what must go.
        metric: the criterion's scores, by site key, which group channels.
        policy: says what is one variable, and what shares a target.
        counts: how many units each site keeps, where that is decided already, which says the targets.
    """
    if policy.layers == "block":
        return _block_variables(sites, budget)
    pools = pools_of(sites, policy)
    of, layers, cost, pool = {}, dict[str, list[int]](), list[int](), list[int]()
    for site in sites:
        group = _groups(site, metric[site.key], policy)
        sizes = torch.bincount(group).tolist()
        of[site.key] = group + len(cost)
        mine = range(len(cost), len(cost) + len(sizes))
        layers.setdefault(site.name if policy.layers == "sublayer" else site.key, []).extend(mine)
        cost += [size * site.cost for size in sizes]
        pool += [pools[site.key]] * len(sizes)
    return Variables(
        of=of,
        cost=torch.tensor(cost, dtype=torch.float64),
        layers=[torch.tensor(together) for together in layers.values()],
        pool=torch.tensor(pool),
        targets=targets_of(sites, budget, policy) if counts is None else _targets_by_count(sites, counts, pools),
    )


def pools_of(sites: Sequence[Site], policy: Policy) -> dict[str, int]:
    """The number of each site's pool, by site key."""
    names = {site.key: {"kind": site.name, "all": "", "block": site.key}[policy.pool] for site in sites}
    numbers = {name: n for n, name in enumerate(dict.fromkeys(names.values()))}
    return {key: numbers[name] for key, name in names.items()}


def targets_of(sites: Sequence[Site], budget: Budget, policy: Policy) -> list[int]:
    """Parameters to remove from each pool of several blocks: attention its share, FFN the rest; together the budget."""
    if policy.pool == "all":
        return [budget.target]
    total = {name: sum(s.n_units * s.cost for s in sites if s.name == name) for name in ("attention", "ffn")}
    attention = min(budget.attention_share * budget.sparsity if total["ffn"] else budget.sparsity, 1.0)
    kinds = {"attention": int(attention * total["attention"])}
    kinds["ffn"] = budget.target - kinds["attention"]
    return [kinds[name] for name in dict.fromkeys(site.name for site in sites)]


def _targets_by_count(sites: Sequence[Site], counts: Counts, pools: Mapping[str, int]) -> list[int]:
    """Parameters that go from each pool where every site's units are counted already."""
    targets = [0] * (max(pools.values()) + 1)
    for site in sites:
        targets[pools[site.key]] += (site.n_units - counts[site.key]) * site.cost
    return targets


def _block_variables(sites: Sequence[Site], budget: Budget) -> Variables:
    groups = by_block(sites)
    blocks = sorted(groups)
    costs = [sum(site.cost * site.n_units for site in groups[i]) for i in blocks]
    return Variables(
        of={site.key: torch.full((site.n_units,), blocks.index(site.block)) for site in sites},
        cost=torch.tensor(costs, dtype=torch.float64),
        layers=[torch.arange(len(blocks))],
        pool=torch.zeros(len(blocks), dtype=torch.long),
        targets=[budget.target],
        blocks=blocks,
    )


def _groups(site: Site, scores: Float[Tensor, " unit"], policy: Policy) -> Int[Tensor, " unit"]:
    """The group of each unit of a site, from 0; where they follow the scores, the group of the lowest is 0."""
    n, ffn = site.n_units, site.spec.probabilities is None
    size = n if policy.layers == "sublayer" else 1
    if ffn and policy.layers == "none" and policy.ffn_groups:
        size = -(-n // policy.ffn_groups)
    number = torch.arange(n) // size
    if policy.grouping == "adjacent":
        return number
    found = torch.empty_like(number)
    found[scores.argsort(stable=True)] = number
    return found
