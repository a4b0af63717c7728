"""Where a model can be narrowed: sites found from an architecture's data, checked against the real weights.

A *site* is a set of interchangeable units (FFN channels, heads, KV groups) in one block, with the layers that
shrink when a unit goes: *producers* lose output rows, the one *consumer* loses input columns.
"""

import copy
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import ArchitectureError, RecipeError, UnsupportedModelError

UNITS = ("group", "query")


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """One kind of site as data; paths are relative to the block.

    A layout says how units lie along an axis: `channel` (1 position), `head` (head_dim), `group` (head_dim x query
    heads per KV head); `+` joins parts inside one unit, `|` puts blocks of all units side by side. `bias` is the config
    flag that gives the consumer a bias, with all the layers that get one then.
    """

    name: str
    count: str
    producers: Mapping[str, str]
    consumer: tuple[str, str]
    config_fields: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)
    probabilities: str | None = None
    value: tuple[str, int] | None = None
    normed: tuple[str, ...] = ()
    bias: tuple[str, tuple[str, ...]] | None = None
    stock: bool = True


@dataclass(frozen=True, kw_only=True)
class Relabel:
    """Another stock model type that builds the same function, with the config fields it needs and forbids.

    `drop`: fields that would mean something else there. `scale`: its field for the factor of attention scores, which
    becomes 1 / sqrt(head_dim). Biases that it has beside the model's own are written as zeros.
    """

    model_type: str
    set: Mapping[str, Any] = field(default_factory=dict)
    when: Mapping[str, Any] = field(default_factory=dict)
    drop: tuple[str, ...] = ()
    scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Reader:
    """What a program beside transformers reads of the family's folders.

    `head_dim`: the size of a head from the config, not from hidden size and number of heads. `sites`: the kinds whose
    widths may change. `biases`: the kinds whose consumer has a bias where the family's flag asks for one.
    `uneven_when`: the config values under which blocks may differ in width; None if they may not.
    """

    head_dim: bool = True
    sites: tuple[str, ...] = ("attention", "ffn")
    biases: tuple[str, ...] = ("attention", "ffn")
    uneven_when: Mapping[str, Any] | None = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """An architecture of llama.cpp that computes what the family does, and what it can hold.

    `per_block`: a width for each block. `head_dim`: a head size of its own. `pairs`: q and k with rotary pairs side by
    side. `fused`: q, k and v in one matrix, and the output tied to the embeddings. `biases`: those the family has.
    `scales`: its keys for factors, and the config fields that say them.
    """

    name: str
    per_block: bool = False
    head_dim: bool = True
    pairs: bool = False
    fused: bool = False
    biases: bool = True
    scales: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model family as data: its model types, where its blocks are, and the sites of a block in data-flow order.

    For the hidden dimension: `hidden_fields` are the config fields that say its size, `hidden_writers` the layers
    outside the blocks that write hidden channels as well as read them, and `hidden_stock` is False where stock code
    computes something else from the config's hidden size, so that only `prunelm.load` opens a narrower model.
    """

    model_types: tuple[str, ...]
    blocks: str
    sites: tuple[SiteSpec, ...]
    relabels: tuple[Relabel, ...] = ()
    readers: Mapping[str, Reader] = field(default_factory=dict)
    refuse: Mapping[str, Any] = field(default_factory=dict)
    legacy_rope: Mapping[str, str] = field(default_factory=dict)
    hidden_fields: tuple[str, ...] = ("hidden_size",)
    hidden_writers: tuple[str, ...] = ()
    hidden_stock: bool = True
    gguf: tuple[GgufForm, ...] = ()


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one layer: the positions that each unit owns, part by part, and those that no unit owns."""

    path: str
    layer: nn.Module
    axis: str
    parts: tuple[Int[Tensor, "unit _"], ...]
    fixed: Int[Tensor, " fixed"]

    @property
    def index(self) -> Int[Tensor, "unit width"]:
        """All positions of each unit."""
        return torch.cat(self.parts, dim=1)

    def keep(self, kept: Int[Tensor, " kept"]) -> Int[Tensor, " position"]:
        """Positions that stay when the units `kept` stay, in their old order."""
        return torch.cat([self.index[kept].flatten(), self.fixed]).sort().values

    def order(self, units: Int[Tensor, " unit"]) -> Int[Tensor, " position"]:
        """Positions that no unit owns, then those of each unit in the order of `units`."""
        return torch.cat([self.fixed, self.index[units].flatten()])


@dataclass(frozen=True, eq=False)
class Site:
    """The interchangeable units of one kind in one block, with the layers that shrink with them.

    `per_query`: a unit is one query head of a KV head that stays, not a KV head with all its query heads.
    `strata`: units come in this many equal runs, and every run must keep the same number (query heads of a KV head).
    `value_index`: for attention, the row of the value projection that feeds each consumer column.
    """

    block: int
    spec: SiteSpec
    root: nn.Module
    config: PreTrainedConfig
    n_units: int
    strata: int
    per_query: bool
    head_dim: int
    queries_per_kv: int
    producers: tuple[Slot, ...]
    consumer: Slot
    value: tuple[nn.Module, Int[Tensor, "unit width"]] | None

    @property
    def name(self) -> str:
        """`attention` or `ffn`."""
        return self.spec.name

    @property
    def key(self) -> str:
        """Name of this site in plans and reports, as in `3.ffn`."""
        return f"{self.block}.{self.spec.name}"

    @property
    def cost(self) -> int:
        """Parameters that go with one unit, biases of producers included."""
        total = 0
        for slot in (*self.producers, self.consumer):
            width = slot.index.shape[1]
            out, into = weight_of(slot.layer).shape
            total += width * (into if slot.axis == "out" else out)
            if slot.axis == "out" and bias_of(slot.layer) is not None:
                total += width
        return total

    def measures(self, n_kept: int) -> dict[str, int]:
        """Sizes after keeping `n_kept` units, by the names that architecture files use."""
        if self.per_query:
            kv_heads = self.strata
            per_kv = n_kept // self.strata
        else:
            kv_heads, per_kv = n_kept, self.queries_per_kv
        return {
            "units": n_kept,
            "kv_heads": kv_heads,
            "queries": kv_heads * per_kv,
            "queries_per_kv": per_kv,
            "width": kv_heads * per_kv * self.head_dim,
        }

    def config_values(self, n_kept: int) -> dict[str, int]:
        """Config fields that describe this site once `n_kept` units stay."""
        measures = self.measures(n_kept)
        values = {name: measures[measure] for name, measure in self.spec.config_fields.items()}
        if self.spec.probabilities is not None and self.spec.stock:
            values["head_dim"] = self.head_dim
        return values


def weight_of(layer: nn.Module) -> Tensor:
    """The layer's weight as (out, in): GPT-2's Conv1D stores the transpose."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


def bias_of(layer: nn.Module) -> Tensor | None:
    """The layer's bias, or None."""
    bias: Tensor | None = getattr(layer, "bias", None)
    return bias


@torch.no_grad()
def set_weight_(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Write an (out, in) weight of the same shape, and a bias, into the layer, in the layer's own dtype."""
    weight_of(layer).copy_(weight)
    own = bias_of(layer)
    if bias is not None:
        if own is None:
            raise ArchitectureError("a bias was solved for a layer that has none")
        own.copy_(bias)


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's blocks."""
    architecture = architecture_of(model.config)
    base = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is base)
    blocks = base.get_submodule(architecture.blocks)
    if not isinstance(blocks, nn.ModuleList):
        raise ArchitectureError(f"{architecture.blocks} of {type(base).__name__} is not a list of blocks")
    return f"{prefix}.{architecture.blocks}".lstrip("."), blocks


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Every config object that the model and its modules hold, once each."""
    found = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    return list(found.values())


def other_activation(config: PreTrainedConfig) -> str | None:
    """The activation of a gated FFN, where it is not SiLU, which other programs compute for all Llama-like models."""
    name = getattr(config, "hidden_act", None)
    return name if isinstance(name, str) and name not in ("silu", "swish") else None


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture data for a config.

    Raises:
        UnsupportedModelError: no data for this model type, or a part of it that cannot be narrowed.
    """
    from .architectures import lookup

    architecture = lookup(config.model_type)
    for name, forbidden in architecture.refuse.items():
        if getattr(config, name, None) == forbidden:
            raise UnsupportedModelError(
                f"{config.model_type} with {name}={forbidden!r} cannot be pruned: its heads are tied to something "
                "that no site describes. See docs/add-a-model.md."
            )
    return architecture


def find_sites(model: PreTrainedModel, unit: str = "group") -> list[Site]:
    """Every site of the model in data-flow order, checked against the real weights.

    Args:
        model: any model of a known family, also one that was narrowed before.
        unit: `group` (a unit is a KV head with its query heads) or `query` (one query head; the same number goes
            from every KV head). The two are the same for plain multi-head attention.

    Raises:
        UnsupportedModelError: unknown family.
        ArchitectureError: the data does not fit the weights; the message names the layer and both sizes.
        RecipeError: no such unit.
    """
    if unit not in UNITS:
        raise RecipeError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    architecture = architecture_of(model.config)
    prefix, blocks = find_blocks(model)
    sites = []
    for i, block in enumerate(blocks):
        config = block_config(block, model.config)
        specs = [spec for spec in architecture.sites if not _is_gone(spec, config)]
        sites += [_site(f"{prefix}.{i}", block, i, spec, config, unit) for spec in specs]
    return sites


def gone_sites(model: PreTrainedModel) -> dict[str, SiteSpec]:
    """The sites, by key, that have lost all their units, and that `find_sites` therefore leaves out."""
    configs = [block_config(block, model.config) for block in find_blocks(model)[1]]
    specs = architecture_of(model.config).sites
    return {f"{i}.{spec.name}": spec for i, c in enumerate(configs) for spec in specs if _is_gone(spec, c)}


def _is_gone(spec: SiteSpec, config: PreTrainedConfig) -> bool:
    return getattr(config, spec.count, None) == 0


def block_config(block: nn.Module, default: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the block's own modules read; after uneven narrowing it differs from the model's."""
    for module in block.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            return config
    return default


def _site(path: str, block: nn.Module, i: int, spec: SiteSpec, config: PreTrainedConfig, unit: str) -> Site:
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    per_kv = heads // max(kv_heads, 1)
    grouped = "group" in spec.consumer[1]
    per_query = unit == "query" and grouped and per_kv > 1
    count = getattr(config, spec.count, None)
    if count is None:
        count = weight_of(block.get_submodule(spec.consumer[0])).shape[1]
    layout = _Layout(int(count), head_dim, per_kv, per_query)
    producers = []
    for name, text in spec.producers.items():
        slot = layout.slot(f"{path}.{name}", block.get_submodule(name), "out", text, spec)
        if slot is not None:
            producers.append(slot)
    consumer = layout.slot(
        f"{path}.{spec.consumer[0]}", block.get_submodule(spec.consumer[0]), "in", spec.consumer[1], spec
    )
    if consumer is None or not producers:
        raise ArchitectureError(f"{path}: site {spec.name!r} has no units")
    return Site(
        block=i,
        spec=spec,
        root=block,
        config=config,
        n_units=consumer.index.shape[0],
        strata=int(count) if per_query else 1,
        per_query=per_query,
        head_dim=head_dim,
        queries_per_kv=per_kv,
        producers=tuple(producers),
        consumer=consumer,
        value=_value_rows(block, spec, layout, consumer),
    )


def _value_rows(
    block: nn.Module, spec: SiteSpec, layout: "_Layout", consumer: Slot
) -> tuple[nn.Module, Int[Tensor, "unit width"]] | None:
    """The value projection and the row of it that feeds each consumer column."""
    if spec.value is None:
        return None
    path, part = spec.value
    if path not in spec.producers:
        raise ArchitectureError(f"site {spec.name!r}: its value layer {path!r} is none of its producers")
    rows = layout.positions(spec.producers[path])[0][part]
    queries = layout.per_kv if "group" in spec.consumer[1] else 1
    rows = rows[:, None, :].expand(-1, queries, -1)
    return block.get_submodule(path), rows.reshape(consumer.index.shape)


@dataclass(frozen=True)
class _Layout:
    """Positions of units along an axis, from a layout text."""

    count: int
    head_dim: int
    per_kv: int
    per_query: bool

    def width(self, part: str) -> int:
        sizes = {"channel": 1, "head": self.head_dim, "group": self.head_dim * self.per_kv}
        if part not in sizes:
            raise ArchitectureError(f"unknown layout part {part!r}: use channel, head or group")
        return sizes[part]

    def positions(self, text: str) -> tuple[list[Tensor], list[str], int]:
        """Per part the positions of each of `count` units, the part names, and the axis length."""
        offset, found, names = 0, [], []
        for chunk in text.split("|"):
            parts = [part.strip() for part in chunk.split("+")]
            stride = sum(self.width(part) for part in parts)
            start = offset
            for part in parts:
                begin = start + torch.arange(self.count, device="cpu")[:, None] * stride
                found.append(begin + torch.arange(self.width(part), device="cpu")[None, :])
                names.append(part)
                start += self.width(part)
            offset += stride * self.count
        return found, names, offset

    def slot(self, path: str, layer: nn.Module, axis: str, text: str, spec: SiteSpec) -> Slot | None:
        found, names, length = self.positions(text)
        actual = weight_of(layer).shape[0 if axis == "out" else 1]
        if actual != length:
            raise ArchitectureError(
                f"{path}: its {axis} axis has {actual} entries, but layout {text!r} with {self.count} units "
                f"({spec.count}) makes {length}"
            )
        if not self.per_query:
            return Slot(path, layer, axis, tuple(found), torch.empty(0, dtype=torch.long, device="cpu"))
        parts = [p.reshape(-1, self.head_dim) for p, name in zip(found, names, strict=True) if name == "group"]
        fixed = [p.flatten() for p, name in zip(found, names, strict=True) if name != "group"]
        if not parts:
            return None
        return Slot(
            path,
            layer,
            axis,
            tuple(parts),
            torch.cat([*fixed, torch.empty(0, dtype=torch.long, device="cpu")]),
        )


@torch.no_grad()
def narrow_(site: Site, kept: Int[Tensor, " kept"]) -> None:
    """Remove every unit of the site that is not in `kept`, in place; the model stays runnable.

    Slices producers' rows (and biases) and the consumer's columns, sets the attributes that the block's code reads,
    and gives the block a config of its own with the new sizes. A `Site` found before is stale afterwards. Without any
    unit the consumer still gives its bias, and attention is not computed.
    """
    kept = kept.sort().values
    for slot in (*site.producers, site.consumer):
        _slice_(slot, slot.keep(kept))
    measures = site.measures(len(kept))
    for path, measure in site.spec.attributes.items():
        owner, _, name = path.rpartition(".")
        setattr(site.root.get_submodule(owner), name, measures[measure])
    _own_config_(site, measures)
    if len(kept) == 0 and isinstance(site.consumer.layer, Conv1D):
        site.consumer.layer.forward = types.MethodType(_gives_bias, site.consumer.layer)
    if len(kept) == 0 and site.spec.probabilities is not None:
        _stop_attending_(site.root.get_submodule(site.spec.probabilities), site.spec)


def _slice_(slot: Slot, keep: Int[Tensor, " position"]) -> None:
    layer, out = slot.layer, slot.axis == "out"
    device = weight_of(layer).device
    keep = keep.to(device)
    dim = int(out) if isinstance(layer, Conv1D) else int(not out)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    layer.weight = nn.Parameter(weight.index_select(dim, keep).contiguous(), requires_grad=weight.requires_grad)
    bias = bias_of(layer)
    if out and bias is not None:
        layer.bias = nn.Parameter(bias.index_select(0, keep).contiguous(), requires_grad=bias.requires_grad)
    size = len(keep)
    if isinstance(layer, Conv1D):
        setattr(layer, "nf" if out else "nx", size)
    else:
        setattr(layer, "out_features" if out else "in_features", size)


def _stop_attending_(attention: nn.Module, spec: SiteSpec) -> None:
    """Let an attention module without heads give what its consumer makes of nothing: code for heads cannot."""
    inside = f"{spec.probabilities}."
    path = spec.consumer[0]
    attention.empty_consumer = path.removeprefix(inside) if path.startswith(inside) else None  # type: ignore[assignment]
    attention.forward = types.MethodType(_attends_to_nothing, attention)


def _gives_bias(self: Conv1D, x: Tensor) -> Tensor:
    """What a Conv1D gives for inputs without any channel, which its own code cannot reshape."""
    bias: Tensor = self.bias
    return bias.expand(*x.shape[:-1], -1)


def _attends_to_nothing(self: nn.Module, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, None]:
    nothing = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
    consumer = getattr(self, "empty_consumer", None)
    return (nothing if consumer is None else self.get_submodule(consumer)(nothing)), None


def _own_config_(site: Site, measures: Mapping[str, int]) -> None:
    own = copy.copy(block_config(site.root, site.config))
    for name, measure in site.spec.config_fields.items():
        setattr(own, name, measures[measure])
    if site.spec.probabilities is not None:
        own.head_dim = site.head_dim
    for module in site.root.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = own


def by_block(sites: Sequence[Site]) -> dict[int, list[Site]]:
    """The sites of each block, in data-flow order."""
    groups: dict[int, list[Site]] = {}
    for site in sites:
        groups.setdefault(site.block, []).append(site)
    return groups
