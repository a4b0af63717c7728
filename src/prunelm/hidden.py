"""The hidden axis of a model: every place where the residual stream's channels are written, normed and read.

Inside blocks it follows from the sites: producers read it, consumers write it, norms scale it. Outside blocks it is the
columns of the embeddings, the final norm, and whatever layer reads the stream there. Channels go everywhere at once.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ArchitectureError, UnsupportedModelError
from .sites import Site, architecture_of, bias_of, configs_of, find_blocks, find_sites, weight_of

BUILT = "hidden_size_when_built"
"""Attribute of a narrowed model: the hidden size that its class was built with."""
SIZES = ("hidden_size", "embed_dim")
"""Attributes by which modules remember the hidden size."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One axis of one parameter that holds the hidden channels; `role`: embedding, norm, reader or writer."""

    path: str
    module: nn.Module
    parameter: str
    dim: int
    role: str


@dataclass(frozen=True, eq=False)
class Readers:
    """Layers that read the hidden channels and share their input; `block` is None outside the blocks.

    `paths` are relative to the block, or to the model outside; `tied`: the weight belongs to the embeddings as well.
    """

    block: int | None
    paths: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    tied: bool = False


@dataclass(frozen=True, eq=False)
class HiddenAxis:
    """Where the hidden channels of a model are; readers in the order in which the model runs them."""

    width: int
    cuts: tuple[Cut, ...]
    readers: tuple[Readers, ...]


def find_hidden(model: PreTrainedModel) -> HiddenAxis:
    """The hidden axis of a model, every parameter with an axis of that size accounted for.

    Raises:
        UnsupportedModelError: unknown family, or embeddings of another width than the hidden size.
        ArchitectureError: a layer does not have the hidden size where its role says so, or a parameter has an axis of
            that size and no role; names it.
    """
    width = int(model.config.hidden_size)
    sites = find_sites(model)
    roles = {slot.layer: "reader" for site in sites for slot in site.producers}
    roles |= {site.consumer.layer: "writer" for site in sites}
    prefix, _ = find_blocks(model)
    beside = _norms_of_outputs(sites)
    writers = architecture_of(model.config).hidden_writers
    cuts: list[Cut] = []
    outside: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if path.startswith(f"{prefix}."):
            cuts += _inside(path, module, roles.get(module), beside, width)
        else:
            found = list(_outside(path, module, writers, width))
            outside += [(path, module)] if any(cut.role == "reader" for cut in found) else []
            cuts += found
    _account_for(model, cuts, width)
    embedded = {id(cut.module.weight) for cut in cuts if cut.role == "embedding"}
    readers = [Readers(s.block, tuple(s.spec.producers), tuple(p.layer for p in s.producers)) for s in sites]
    readers += [Readers(None, (path,), (m,), tied=id(m.weight) in embedded) for path, m in outside]
    return HiddenAxis(width, tuple(cuts), tuple(readers))


def _norms_of_outputs(sites: list[Site]) -> set[nn.Module]:
    """Modules beside producers that are followed by a norm: a norm among them scales outputs, not hidden channels."""
    paths = ((site.root, path.rpartition(".")[0]) for site in sites for path in site.spec.normed)
    return {module for root, path in paths for module in root.get_submodule(path).children()}


def _inside(path: str, module: nn.Module, role: str | None, normed: set[nn.Module], width: int) -> Iterator[Cut]:
    """The hidden axes of a module of a block."""
    if role is not None:
        yield from _of_layer(path, module, role, width)
    elif _is_norm(module, width):
        if module in normed:
            raise ArchitectureError(
                f"{path}: a norm of producers' outputs has {width} entries, as many as the hidden size, so its axis "
                "cannot be told from the hidden one. Leave hidden out."
            )
        yield from _of_norm(path, module)


def _outside(path: str, module: nn.Module, writers: tuple[str, ...], width: int) -> Iterator[Cut]:
    """The hidden axes of a module outside the blocks."""
    if isinstance(module, nn.Embedding):
        if module.weight.shape[1] != width:
            raise UnsupportedModelError(
                f"{path}: its vectors have {module.weight.shape[1]} entries and the hidden size is {width}: hidden "
                "channels of a model that projects its embeddings cannot go. Leave hidden out."
            )
        yield Cut(path, module, "weight", 1, "embedding")
    elif isinstance(module, nn.Linear | Conv1D) and weight_of(module).shape[1] == width:
        yield from _of_layer(path, module, "reader", width)
        if f".{path}".endswith(tuple(f".{name}" for name in writers)):
            yield from _of_layer(path, module, "writer", width)
    elif _is_norm(module, width):
        yield from _of_norm(path, module)


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module has no other parameters than vectors over the hidden channels, its weight among them."""
    own = dict(module.named_parameters(recurse=False))
    leaf = next(module.children(), None) is None
    return leaf and "weight" in own and all(p.shape == (width,) for p in own.values())


def _of_norm(path: str, module: nn.Module) -> Iterator[Cut]:
    for name, _ in module.named_parameters(recurse=False):
        yield Cut(path, module, name, 0, "norm")


def _of_layer(path: str, layer: nn.Module, role: str, width: int) -> Iterator[Cut]:
    """The input axis of a reader, the output axis and the bias of a writer."""
    out = role == "writer"
    size = weight_of(layer).shape[0 if out else 1]
    if size != width:
        side = "writes" if out else "reads"
        raise ArchitectureError(f"{path}: it {side} {size} channels, but the hidden size is {width}")
    yield Cut(path, layer, "weight", int(out) if isinstance(layer, Conv1D) else int(not out), role)
    if out and bias_of(layer) is not None:
        yield Cut(path, layer, "bias", 0, role)


def _account_for(model: PreTrainedModel, cuts: list[Cut], width: int) -> None:
    """Raise if a module without a role has a parameter or a float buffer with an axis of the hidden size."""
    known = {cut.module for cut in cuts}
    for path, module in model.named_modules():
        if module in known:
            continue
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            if tensor.is_floating_point() and width in tensor.shape:
                raise ArchitectureError(
                    f"{f'{path}.{name}'.lstrip('.')}: an axis of {width} entries, the hidden size, in a layer that "
                    "nothing says reads or writes hidden channels. Leave hidden out; see docs/add-a-model.md."
                )


@torch.no_grad()
def narrow_hidden_(model: PreTrainedModel, kept: Int[Tensor, " kept"]) -> None:
    """Remove every hidden channel that is not in `kept`, in place and everywhere at once; the model stays runnable.

    Equal to silencing those channels: they are zero in the residual stream at every place (embeddings, outputs of
    writers, outputs of norms), and norms take their statistics over the channels that stay. Tied parameters stay tied.
    The config says the new hidden size and, from now on, `head_dim`, which no longer follows from it. A `Site` found
    before is stale afterwards.

    Raises:
        ArchitectureError, UnsupportedModelError: see `find_hidden`; nothing was changed.
    """
    axis = find_hidden(model)
    kept = kept.sort().values
    head_dim = next(site.head_dim for site in find_sites(model))
    held = {id(module): names for module, names in _held_by_sites(model).items()}
    dims: dict[int, set[int]] = {}
    for cut in axis.cuts:
        dims.setdefault(id(cut.module.get_parameter(cut.parameter)), set()).add(cut.dim)
    fresh: dict[int, nn.Parameter] = {}
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in dims:
                if id(parameter) not in fresh:
                    fresh[id(parameter)] = _sliced(parameter, dims[id(parameter)], kept)
                module._parameters[name] = fresh[id(parameter)]
        _set_sizes_(module, axis.width, len(kept), held.get(id(module), set()))
    for cut in axis.cuts:
        _set_layer_size_(cut, len(kept))
    for config in configs_of(model):
        set_hidden_size_(config, len(kept))
        config.head_dim = head_dim
    setattr(model, BUILT, built_width(model) or axis.width)


def built_width(model: PreTrainedModel) -> int | None:
    """The hidden size that a narrowed model's class was built with; None for a model that has all its channels."""
    width: int | None = getattr(model, BUILT, None)
    return width


def set_hidden_size_(config: PreTrainedConfig, width: int) -> None:
    """Set every field of a config that says the hidden size."""
    for name in architecture_of(config).hidden_fields:
        setattr(config, name, width)


def built_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The model's config with the hidden size that its class was built with; narrowed again, it gives the model."""
    config: PreTrainedConfig = copy.deepcopy(model.config)
    width = built_width(model)
    if width is not None:
        set_hidden_size_(config, width)
    return config


def shapes_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model without its weights, to try on it what may fail."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


def _held_by_sites(model: PreTrainedModel) -> dict[nn.Module, set[str]]:
    """Attributes that say sizes of sites, by module; they may equal the hidden size by accident."""
    found: dict[nn.Module, set[str]] = {}
    for site in find_sites(model):
        for path in site.spec.attributes:
            owner, _, name = path.rpartition(".")
            found.setdefault(site.root.get_submodule(owner), set()).add(name)
    return found


def _sliced(parameter: nn.Parameter, dims: set[int], kept: Int[Tensor, " kept"]) -> nn.Parameter:
    found = parameter.detach()
    for dim in dims:
        found = found.index_select(dim, kept.to(found.device))
    return nn.Parameter(found.contiguous(), requires_grad=parameter.requires_grad)


def _set_sizes_(module: nn.Module, width: int, now: int, held: set[str]) -> None:
    """Set the attributes by which a module remembers the hidden size."""
    for name in SIZES:
        if name not in held and vars(module).get(name) == width:
            setattr(module, name, now)
    if isinstance(module, nn.LayerNorm) and module.normalized_shape == (width,):
        module.normalized_shape = (now,)


def _set_layer_size_(cut: Cut, now: int) -> None:
    """Set the attribute by which a layer or an embedding remembers the length of an axis."""
    if cut.role == "embedding":
        setattr(cut.module, "embedding_dim", now)  # noqa: B010
    elif cut.role != "norm" and cut.parameter == "weight":
        names = ("nf", "nx") if isinstance(cut.module, Conv1D) else ("out_features", "in_features")
        setattr(cut.module, names[0 if cut.role == "writer" else 1], now)
