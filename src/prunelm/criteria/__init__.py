"""Criteria: a score for each unit of a site; the lowest go first. One file each, one function, one decorator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..gradients import Gradient
from ..importance import Importance
from ..moments import Moments
from ..registry import Registry
from ..sites import Site

NEEDS = frozenset({"consumer", "gram", "producer", "similarity", "gradients", "fisher", "importance", "gates"})


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What calibration knows of one site.

    `consumer`: moments of the consumer's input (at least the diagonal); `producer`: full moments of the producers'
    common input; `similarity`: the Jensen-Shannon matrix of the heads; `gradients`: of the dense model's loss, by the
    path of the layer; `fisher`: how the model's output answers to the consumer's; `importance`: what each sequence says
    of each unit; `gates`: the slope of each sequence's loss by a gate on each unit. None where no criterion asked.
    """

    consumer: Moments | None = None
    producer: Moments | None = None
    similarity: Float[Tensor, "head head"] | None = None
    gradients: Mapping[str, Gradient] | None = None
    fisher: Float[Tensor, "out out"] | None = None
    importance: Importance | None = None
    gates: Float[Tensor, "sample unit"] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """A registered scoring function and the statistics it reads.

    `curve`: its sorted scores are already the relative error of the module at every size. `standard`: its scores are
    means over a unit's channels, in standard deviations of all the site's channels.
    """

    name: str
    score: Callable[..., Float[Tensor, " unit"]]
    needs: Callable[..., frozenset[str]] = field(default=lambda **_: frozenset())
    curve: bool = False
    standard: bool = False

    def __call__(self, site: Site, statistics: Statistics, **options: Any) -> Float[Tensor, " unit"]:
        """One score per unit of the site; the lowest goes first."""
        return self.score(site, statistics, **options)


CRITERIA: Registry[Criterion] = Registry("criterion", "prunelm.criteria")

Score = Callable[..., Float[Tensor, " unit"]]


def criterion(
    name: str,
    *,
    needs: frozenset[str] | set[str] | Callable[..., set[str]] = frozenset(),
    curve: bool = False,
    standard: bool = False,
) -> Callable[[Score], Score]:
    """A decorator that registers `(site, statistics, *, options) -> score per unit` under `name`.

    Args:
        name: what recipes call it.
        needs: which of `consumer` (diagonal moments of the consumer's input), `gram` (full ones), `producer`,
            `similarity`, `gradients`, `fisher`, `importance` and `gates` it reads; a function of its options where
            that depends.
        curve: whether the sorted scores are the module's relative error once that many units went.
        standard: whether scores are in standard deviations of the site's channels, so that nothing standardises them.
    """

    def wanted(**options: Any) -> frozenset[str]:
        found = frozenset(needs(**options) if callable(needs) else needs)
        if found - NEEDS:
            raise ValueError(f"criterion {name!r} needs {sorted(found - NEEDS)}, but only {sorted(NEEDS)} exist")
        return found

    return lambda score: CRITERIA.adopt(name, Criterion(name, score, wanted, curve, standard), score)


__all__ = ["CRITERIA", "Criterion", "Statistics", "criterion"]
