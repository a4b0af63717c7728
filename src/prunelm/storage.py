"""How many bytes a model takes in a format, and its cache at a context, from its shapes alone."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gguf
from gguf import GGMLQuantizationType
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import BudgetError
from .plan import Counts
from .registry import did_you_mean
from .sites import Site, find_blocks, weight_of

BLOCK = 32
"""Entries that share a scale in q8_0 and q4_0."""
CACHE_BYTES = 2
"""Bytes of a cached number: keys and values are f16 in llama.cpp and vLLM unless they are told otherwise."""
WRITTEN = {name: GGMLQuantizationType[name.upper()] for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
"""Types that `prunelm export` writes."""
PLAIN = WRITTEN | {name: GGMLQuantizationType[name.upper()] for name in ("q4_1", "q5_0", "q5_1")}
"""Types that a whole file has, and that values can be rounded to here."""
MIXES = {
    name: GGMLQuantizationType[kind]
    for name, kind in {"q4_k_s": "Q4_K", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K"}.items()
}
"""Types that llama-quantize makes from an f16 file, by what most matrices are then."""
FORMATS = (*PLAIN, *MIXES, "int8")
SYNONYMS = {"fp32": "f32", "fp16": "f16", "q8": "q8_0", "q4": "q4_0"}
_FINER = {"Q4_K": "Q6_K", "Q5_K": "Q6_K"}
_COARSER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A parameter as it is stored: rows times columns, the block it is in, and the part that it plays there.

    `part` is `embeddings`, `positions` (other tables that are looked up), `output`, `value`, `fused` (q, k and v),
    `down` (out of the FFN) or `other`.
    """

    name: str
    shape: tuple[int, ...]
    part: str = "other"
    block: int | None = None
    blocks: int = 1

    @property
    def entries(self) -> int:
        """Numbers in it."""
        return functools.reduce(lambda a, b: a * b, self.shape, 1)


def format_named(name: str) -> str:
    """The format that a user means.

    Raises:
        BudgetError: there is none of that name; says which there are.
    """
    found = SYNONYMS.get(name.lower(), name.lower())
    if found not in FORMATS:
        raise BudgetError(f"unknown format {name!r}. {did_you_mean(found, FORMATS)}Known: {', '.join(FORMATS)}.")
    return found


def stored_after(model: PreTrainedModel, sites: Sequence[Site], counts: Counts) -> list[Stored]:
    """Every parameter of a model, tied ones once, with the shapes that it has once so many units stay in each site."""
    shapes, parts, blocks = _changed(sites, counts), _parts(model, sites), _blocks(model)
    known: dict[int, str] = {}
    found = []
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if known.setdefault(id(parameter), path) != path:
                continue
            whole = f"{path}.{name}".lstrip(".")
            conv = name == "weight" and isinstance(module, Conv1D)
            shape = shapes.get(whole) or tuple((weight_of(module) if conv else parameter).shape)
            block = blocks.get(path)
            part = parts.get(whole, "other")
            found.append(Stored(name=whole, shape=shape, part=part, block=block, blocks=len({*blocks.values()})))
    return found


def _changed(sites: Sequence[Site], counts: Counts) -> dict[str, tuple[int, ...]]:
    """The new shapes of what shrinks with the sites."""
    found: dict[str, tuple[int, ...]] = {}
    for site in sites:
        gone = site.n_units - counts.get(site.key, site.n_units)
        for slot in (*site.producers, site.consumer):
            less = gone * sum(part.shape[1] for part in slot.parts)
            out, into = found.get(f"{slot.path}.weight") or tuple(weight_of(slot.layer).shape)
            rows = slot.axis == "out"
            found[f"{slot.path}.weight"] = (out - less, into) if rows else (out, into - less)
            if rows:
                found[f"{slot.path}.bias"] = (out - less,)
    return found


def _parts(model: PreTrainedModel, sites: Sequence[Site]) -> dict[str, str]:
    """The parts that llama-quantize treats apart, by the names of their weights."""
    found = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for site in sites:
        if site.spec.probabilities is None:
            found[f"{site.consumer.path}.weight"] = "down"
        elif site.value is not None:
            found[names[id(site.value[0].weight)]] = "fused" if len(site.spec.producers) == 1 else "value"
    for part, module in (("output", model.get_output_embeddings()), ("embeddings", model.get_input_embeddings())):
        name = names.get(id(getattr(module, "weight", None)))
        if name is not None:
            found.setdefault(name, part)
    for path, table in model.named_modules():
        if isinstance(table, nn.Embedding):
            found.setdefault(f"{path}.weight", "positions")
    return found


def _blocks(model: PreTrainedModel) -> dict[str, int]:
    """The block of every layer in one, by the layer's name."""
    prefix, blocks = find_blocks(model)
    return {f"{prefix}.{i}.{name}": i for i, block in enumerate(blocks) for name, _ in block.named_modules() if name}


def stored_bytes(tensors: Sequence[Stored], name: str) -> int:
    """Bytes of the tensors in a format: those that `prunelm export` or llama-quantize would write, without padding.

    int8 is one byte an entry and a float32 scale a row, embeddings and output left at two bytes, as torchao does it.
    """
    if name == "int8":
        return sum(_int8_bytes(tensor) for tensor in tensors)
    total = 0
    for tensor in tensors:
        per_block, size = gguf.GGML_QUANT_SIZES[type_of(tensor, name)]
        total += tensor.entries // per_block * size
    return total


def _int8_bytes(tensor: Stored) -> int:
    if len(tensor.shape) == 1 or tensor.part in ("embeddings", "output"):
        return CACHE_BYTES * tensor.entries
    return tensor.entries + _SCALE_BYTES * tensor.shape[0]


def type_of(tensor: Stored, name: str) -> GGMLQuantizationType:
    """The type of one tensor in a file of some format."""
    if name in PLAIN:
        return written_type(tensor.shape, PLAIN[name], finer=tensor.part in ("embeddings", "output"))
    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    return _fitting(_mixed(tensor, name), tensor.shape[-1])


def written_type(shape: tuple[int, ...], wanted: GGMLQuantizationType, *, finer: bool) -> GGMLQuantizationType:
    """Vectors stay f32, rows that do not divide into blocks f16; of 4 or 5 bits, embeddings and output have 8."""
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if gguf.GGML_QUANT_SIZES[wanted][0] == 1:
        return wanted
    if shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if finer else wanted


def _mixed(tensor: Stored, name: str) -> GGMLQuantizationType:
    """What llama-quantize gives a matrix whose rows divide: finer at both ends and in every third block between.

    The output, or embeddings that are tied to it, have 6 bits; embeddings of their own are like the rest.
    """
    most = MIXES[name]
    finer = GGMLQuantizationType[_FINER.get(most.name, most.name)]
    if tensor.part == "output":
        return GGMLQuantizationType.Q6_K
    if tensor.part == "fused" and name.endswith("_m"):
        return GGMLQuantizationType.Q5_K if most == GGMLQuantizationType.Q4_K else finer
    if tensor.block is None or tensor.part not in ("value", "down"):
        return most
    eighth = tensor.blocks // 8
    if name.endswith("_m"):
        inside = eighth <= tensor.block < 7 * tensor.blocks // 8
        return finer if not inside or (tensor.block - eighth) % 3 == 2 else most
    early = tensor.block < (4 if tensor.part == "value" else eighth)
    return GGMLQuantizationType.Q5_K if most == GGMLQuantizationType.Q4_K and early else most


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """The type itself, or the next larger one whose blocks divide a row."""
    if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0:
        return kind
    return GGMLQuantizationType[_COARSER[kind.name]] if columns % BLOCK == 0 else GGMLQuantizationType.F16


def cache_bytes_of(sites: Sequence[Site], counts: Mapping[str, int], context: int) -> int:
    """Bytes of keys and values of one text of so many tokens: 2 x KV heads x head size x tokens x 2 bytes a block.

    Windows that some blocks attend to are not made use of.
    """
    heads = [s for s in sites if s.spec.probabilities is not None]
    kept = ((s, s.measures(counts.get(s.key, s.n_units))["kv_heads"]) for s in heads)
    return sum(2 * kv_heads * s.head_dim * context * CACHE_BYTES for s, kv_heads in kept)


def step_of(name: str) -> int:
    """What widths must be a multiple of for rows to divide into a format's blocks; 1 where there are none."""
    return 1 if name in ("f32", "f16", "bf16", "int8") else BLOCK
