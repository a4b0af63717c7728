"""Baselines that look at weights alone, or at nothing: l1, l2, random."""

import torch
from jaxtyping import Float
from torch import Tensor

from ..placement import exact, statistics_device
from ..sites import Site, weight_of
from . import Statistics, criterion


def _powers(site: Site, power: int) -> Float[Tensor, " unit"]:
    """Sum of |w|^power over all the weights that go with each unit."""
    total = torch.zeros(
        site.n_units, dtype=torch.float64, device=statistics_device(weight_of(site.consumer.layer).device)
    )
    for slot in (*site.producers, site.consumer):
        weight = exact(weight_of(slot.layer)).abs().pow(power)
        per_position = weight.sum(1 if slot.axis == "out" else 0)
        total += per_position[slot.index].sum(1)
    return total


@criterion("l1")
def l1(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Sum of absolute weights that go with the unit: sum |w| over its producer rows and consumer columns."""
    return _powers(site, 1)


@criterion("l2")
def l2(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Norm of the weights that go with the unit: (sum w^2)^(1/2) over its producer rows and consumer columns."""
    return _powers(site, 2).sqrt()


@criterion("random")
def random(site: Site, statistics: Statistics) -> Float[Tensor, " unit"]:
    """Uniform random numbers, drawn from the recipe's seed, the block and the site's name."""
    salt = sum(ord(letter) for letter in site.name)
    generator = torch.Generator().manual_seed(statistics.seed * 1_000_003 + site.block * 1_009 + salt)
    return torch.rand(site.n_units, generator=generator, dtype=torch.float64)
