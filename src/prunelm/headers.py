"""What the headers of weight files say, and the refusal of a config that asks for more before anything is allocated."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from .errors import CheckpointError

Shape = tuple[int, ...]
_BLOCKS = "num_hidden_layers"
"""What transformers calls the number of blocks, whatever a family's config.json calls it."""
_TIMES = 4
"""How often a weight may be made while a model is built: it can be tied, and be narrowed along both axes."""
_PARTS = 64
"""Weights that a model may have beside those: heads that are tied, or missing, which is said by their names."""
_OWN, _COMPUTED = 1 << 24, 1 << 28
"""Numbers in weights that may be missing, and in what a model computes itself, such as masks and positions."""

_SHARE, _FEW = 4, 1 << 20
"""The number of a unit takes as much as four stored numbers in float16; so many of them are few for any model."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What weight files hold, by their headers: at most so many tensors and numbers, and shapes by name if known."""

    tensors: int
    numbers: int
    shapes: Mapping[str, Shape] = field(default_factory=dict)


def held_in(files: Sequence[Path]) -> Held:
    """What .safetensors files hold; only their headers are read."""
    shapes: dict[str, Shape] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return Held(tensors=len(shapes), numbers=sum(map(prod, shapes.values())), shapes=shapes)


def check_blocks(config: Mapping[str, Any], held: Held, where: Path) -> None:
    """Raise if a config.json, or a part of it, names more blocks than there are tensors.

    Raises:
        CheckpointError: says both numbers.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in _names_of_blocks(part):
            count = part.get(name)
            if isinstance(count, int | float) and count > held.tensors:
                raise CheckpointError(
                    f"{where}: {name} is {count:,}, and the weight files hold no more than {held.tensors:,} tensors. "
                    "Get config.json again, or the weights that belong to it."
                )


def _names_of_blocks(config: Mapping[str, Any]) -> set[str]:
    """The keys by which a config.json may say how many blocks there are."""
    kind = config.get("model_type")
    known = isinstance(kind, str) and kind in transformers.CONFIG_MAPPING
    aliases = transformers.CONFIG_MAPPING[kind].attribute_map if known else {}
    return {_BLOCKS, aliases.get(_BLOCKS, _BLOCKS)}


@contextlib.contextmanager
def no_more_weights(held: Held, name: str) -> Iterator[None]:
    """While open, a model that is built may not have many more weights than there are tensors.

    Raises:
        CheckpointError: as soon as it has, whichever field of the config is to blame.
    """
    most, made = _TIMES * held.tensors + _PARTS, 0

    def counted(_module: nn.Module, _name: str, _parameter: nn.Parameter) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CheckpointError(
                f"{name}: its config asks for more than {most:,} weights, and the files hold no more than "
                f"{held.tensors:,} tensors. Get config.json again, or the weights that belong to it."
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def check_axes(model: PreTrainedModel, held: Held, name: str) -> None:
    """Raise if the axes of a dense model, whose units are numbered to narrow it, are too long for what is stored of it.

    Raises:
        CheckpointError: names the longest one, and says both numbers.
    """
    shapes = {weight: tuple(parameter.shape) for weight, parameter in model.named_parameters()}
    if sum(map(sum, shapes.values())) > max(held.numbers // _SHARE, _FEW):
        weight = max(shapes, key=lambda weight: max(shapes[weight], default=0))
        raise CheckpointError(
            f"{name}: by its config, {weight} was {shapes[weight]} before it was pruned, and the files hold "
            f"no more than {held.numbers:,} numbers. Get config.json again, or the weights that belong to it."
        )


def check_shapes(model: PreTrainedModel, held: Held, name: str) -> None:
    """Raise if a model's weights, of which only the shapes are there, are larger or smaller than those that are stored.

    Weights whose name is not stored may be stored in another form; so may those with as many numbers in another shape.

    Raises:
        CheckpointError: says which weight, and both shapes; or how many numbers there are, and are stored.
    """
    wrong = [found for found in _stored(model, held) if prod(found[1]) != prod(found[2])]
    if wrong:
        raise shape_error(name, len(wrong), *wrong[0])
    asked, own = (sum(t.numel() for t in tensors) for tensors in (model.parameters(), model.buffers()))
    if asked > 2 * held.numbers + _OWN or own > 2 * held.numbers + _COMPUTED:
        raise CheckpointError(
            f"{name}: its config asks for {asked + own:,} numbers, and the files hold no more than {held.numbers:,}. "
            "Get config.json again, or the weights that belong to it."
        )


def shape_error(name: str, count: int, weight: str, stored: Sequence[int], built: Sequence[int]) -> CheckpointError:
    """The line about weights that are stored in another shape than the config gives them."""
    return CheckpointError(
        f"{name}: {count} weights do not have the config's shapes, first {weight}: {tuple(stored)} in the file, "
        f"{tuple(built)} by the config"
    )


def _stored(model: PreTrainedModel, held: Held) -> Iterator[tuple[str, Shape, Shape]]:
    """Name, stored shape and built shape of every weight that is stored by its name; of tied ones only the first."""
    prefix, seen = f"{model.base_model_prefix}.", set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A bare model may be stored in a larger one, and the other way round.
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in held.shapes), None)
        if key is not None and id(parameter) not in seen:
            seen.add(id(parameter))
            yield name, held.shapes[key], tuple(parameter.shape)
