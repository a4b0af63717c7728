"""The same widths in every block: what plain loaders can open."""

from collections.abc import Iterator, Sequence

from ..errors import BudgetError
from ..plan import Budget, Counts, largest_option
from ..sites import Site
from . import Measured, allocator


@allocator("uniform", even=True)
def uniform(sites: Sequence[Site], budget: Budget) -> tuple[Counts, int]:
    """The same number of units everywhere: attention its share rounded down to whole units, FFN the rest.

    Raises:
        BudgetError: blocks differ already, or no legal widths meet the budget; says which budgets can be met.
    """
    return next(uniform_plans(sites, budget))


@allocator("split", needs="curvature", even=True)
def split(sites: Sequence[Site], budget: Budget, damage: Measured) -> tuple[Counts, int]:
    """The same number of units everywhere, divided between attention and FFN so that summed damage is least.

    Raises:
        BudgetError: blocks differ already, or no legal widths meet the budget; says which budgets can be met.
    """
    return min(uniform_plans(sites, budget), key=lambda plan: summed(sites, budget, damage, plan[0]))


def summed(sites: Sequence[Site], budget: Budget, damage: Measured, counts: Counts) -> float:
    """The damage that a plan is expected to do."""
    return sum(float(damage[s.key][budget.options(s).index(s.n_units - counts[s.key])]) for s in sites)


def uniform_plans(sites: Sequence[Site], budget: Budget) -> Iterator[tuple[Counts, int]]:
    """Every plan with equal widths that meets the budget, nearest to equal shares first, and one step of it.

    Raises:
        BudgetError: there is none; says which budgets can be met.
    """
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.name, []).append(site)
    for name, same in kinds.items():
        if len({(site.n_units, site.cost) for site in same}) > 1:
            raise BudgetError(f"{name} widths differ between blocks already: prune this model with --per-block")
    *leading, filler = (same[0] for same in kinds.values())
    blocks = {name: len(same) for name, same in kinds.items()}
    step = budget.step(filler) * blocks[filler.name]
    tried: set[int] = set()
    found = False
    for lead in _leading_choices(leading, budget):
        spent = sum(blocks[s.name] * s.cost * removed for s, removed in zip(leading, lead, strict=True))
        want = (budget.target - spent) / (filler.cost * blocks[filler.name])
        if want < 0:
            continue
        last = largest_option(budget.options(filler), want)
        removed = spent + last * filler.cost * blocks[filler.name]
        tried.add(removed)
        if removed and 0 <= budget.target - removed < step:
            counts = {s.name: s.n_units - r for s, r in zip((*leading, filler), (*lead, last), strict=True)}
            found = True
            yield {site.key: counts[site.name] for site in sites}, step
    if not found:
        raise BudgetError(_unmet(budget, kinds, tried, step))


def _leading_choices(leading: Sequence[Site], budget: Budget) -> list[tuple[int, ...]]:
    """Removed units of the sites before the last, best first: its share rounded down, then more, then fewer."""
    choices: list[tuple[int, ...]] = [()]
    for site in leading:
        options = budget.options(site)
        start = options.index(largest_option(options, budget.attention_share * budget.sparsity * site.n_units))
        order = [*options[start:], *reversed(options[:start])]
        choices = [(*head, removed) for head in choices for removed in order]
    return choices


def _unmet(budget: Budget, kinds: dict[str, list[Site]], tried: set[int], step: int) -> str:
    most = sum(budget.options(site)[-1] * site.cost for same in kinds.values() for site in same)
    what = f"sparsity {budget.share(budget.target)} ({budget.target:,} parameters) cannot be met by whole units: "
    if budget.target < step or tried <= {0}:
        return f"{what}nothing would go. One step is {step:,}, so ask for at least {budget.share(step)}."
    if budget.target > most:
        return f"{what}at most {most:,} can go, so ask for at most {budget.share_below(most)}."
    near = max((r for r in tried if r <= budget.target), default=0)
    return f"{what}the nearest below is {budget.share(near)}. Ask for that, or use --per-block."
