"""What backward passes of the dense model give to criteria and allocators, each only where one reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .fisher import output_fisher
from .gradients import Gradient, collect
from .importance import Importance, gate_slopes, importances
from .losses import objective
from .reading import Reading
from .recipe import Recipe
from .sites import Site
from .stream import Room
from .streamed_fisher import streamed_fisher
from .workbench import Workbench


@dataclass(frozen=True, kw_only=True)
class Derivatives:
    """Gradients by the path of the layer; Fisher matrices, importance and gate slopes by site key."""

    gradients: Mapping[str, Gradient] = field(default_factory=dict)
    fisher: Mapping[str, Float[Tensor, "out out"]] = field(default_factory=dict)
    importance: Mapping[str, Importance] = field(default_factory=dict)
    gates: Mapping[str, Float[Tensor, "sample unit"]] = field(default_factory=dict)


def derivatives_of(
    model: PreTrainedModel,
    read: Reading,
    sites: Sequence[Site],
    recipe: Recipe,
    room: Room | None = None,
    bench: Workbench | None = None,
) -> Derivatives:
    """What the recipe's criteria and its allocator read of backward passes over the batches to fit.

    Where the room holds one block at a time, Fisher matrices are on the bench.

    Raises:
        CalibrationError: a gradient is not finite; names the layer.
        UnsupportedModelError: the model has no such loss.
        DataError: the loss needs labels, and there are none.
    """
    wanting = {need: [s for s in sites if need in read.needs[s.name]] for need in ("gradients", "importance", "gates")}
    sharp = [site for site in sites if "fisher" in read.needs[site.name]]
    again = recipe.gradient_checkpointing
    few, fisher = read.fisher_batches(recipe), dict[str, Tensor]()
    if sharp and room is not None and room.deep is not None and bench is not None:
        deep = replace(room, states=room.deep)
        return Derivatives(fisher=streamed_fisher(model, few, sharp, deep, bench, seed=recipe.seed))
    if sharp:
        fisher = output_fisher(model, few, sharp, seed=recipe.seed)
    if not any(wanting.values()):
        return Derivatives(fisher=fisher)
    loss = objective(recipe.loss, model, read.fitted, unlabeled="drawn", seed=recipe.seed)
    by_gradient, by_unit, by_gate = wanting.values()
    return Derivatives(
        fisher=fisher,
        gradients=collect(model, loss.batches, by_gradient, loss) if by_gradient else {},
        importance=importances(model, by_unit, loss, checkpointed=again) if by_unit else {},
        gates=gate_slopes(model, by_gate, loss, checkpointed=again) if by_gate else {},
    )
