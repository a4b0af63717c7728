"""Write a model as one GGUF file, whatever its widths, where some architecture of llama.cpp can hold them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .dequantizing import quantization_of
from .errors import CheckpointError, UnsupportedModelError
from .export_files import Part, exported_file, write_parts
from .exported import Exported
from .gguf_vocabulary import add_vocabulary
from .loading import Source, check_gguf, find_model, load_model, skeleton
from .progress import Progress, silent
from .registry import did_you_mean
from .sites import GgufForm, architecture_of, find_sites, gone_sites, other_activation
from .storage import BLOCK, WRITTEN, written_type
from .stored_weights import StoredWeights
from .writing import check_file

_KEPT_FINER = ("token_embd.weight", "output.weight")


def export_gguf(
    model: str | Path,
    out: str | Path,
    *,
    type: str = "f16",
    parent: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a model as a .gguf file, every value of which is read back before this returns.

    The weights are those of `model`. Equal widths are written as the model's own architecture where that can hold
    them, others as one that has a width for each block.

    Args:
        model: a folder that `prune` wrote, or any model that it accepts.
        out: file to write.
        type: of the matrices: f32, f16, bf16, q8_0 or q4_0. Vectors are always f32.
        parent: the dense model's .gguf file, from which the vocabulary and all metadata but the sizes are taken.
        force: replace `out` if it exists.
        progress: told about every tensor.

    Raises:
        CheckpointError: no such type, a parent of another model, or a tokenizer that cannot be said.
        OutputError: it cannot be written.
        UnsupportedModelError: no architecture of llama.cpp holds the family, or these widths of it.
    """
    if type not in WRITTEN:
        raise CheckpointError(
            f"type must be one of {', '.join(WRITTEN)}, got {type!r}. {did_you_mean(type, WRITTEN)}"
            "llama-quantize of llama.cpp makes others from an f16 file."
        )
    out = Path(out)
    check_file(out, force=force)
    source = find_model(model, device="cpu")
    shapes = skeleton(source, buffers=True)
    form = _form_for(shapes, source.name)
    if parent is not None:
        check_gguf(Path(parent))
    origin = source.folder / source.gguf if parent is None and source.gguf else parent
    shapes, read = _opened(source, shapes)
    with exported_file(out, source, type=type, parent=parent, force=force) as (file, journal):
        writer = GGUFWriter(file.with_name(f"{file.name}.head"), form.name)
        notes = _add_sizes(writer, shapes)
        for key, field in form.scales.items():
            writer.add_float32(f"{form.name}.{key}", float(getattr(shapes.config, field)))
        if origin is None:
            writer.add_name(Path(source.name).name)
            add_vocabulary(writer, source.folder, shapes.config.vocab_size)
        else:
            _add_parent(writer, Path(origin), shapes)
        writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if type == 'f32' else 'MOSTLY'}_{type.upper()}"])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        tensors = _tensors(shapes, form, read)
        types = _types(tensors, WRITTEN[type])
        parts = _parts(writer, tensors, types, shapes, form)
        write_parts(file, _head(writer, tensors, types), parts, journal, progress)
        _read_back(file, tensors, types, shapes, form, progress)
    return Exported(
        path=out,
        architecture=form.name,
        type=type,
        proof="every value read back",
        bytes=out.stat().st_size,
        notes=[*notes, *_odd_rows(tensors, types, WRITTEN[type])],
    )


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A parameter of the model: its shape, and what reads its values."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _opened(source: Source, shapes: PreTrainedModel) -> tuple[PreTrainedModel, Callable[[str], Tensor]]:
    """The model's shapes, and what reads a parameter of that name from the files when it is asked for.

    Where the files hold the weights in another way than the model does, the whole model is loaded.
    """
    stored = StoredWeights.of(source, shapes)
    if stored is not None and quantization_of(source.config(), source.name) is None:
        missing = {name for name, _ in shapes.named_parameters() if name not in stored}
        shapes.tie_weights(missing_keys=missing, recompute_mapping=False)
        sizes = {name: tuple(parameter.shape) for name, parameter in shapes.named_parameters()}
        if all(name in stored for name in sizes):
            return shapes, lambda name: stored.read(name, sizes[name])
    loaded = load_model(source, dtype=None)
    return loaded, loaded.get_parameter


def _types(tensors: Mapping[str, list[_Piece]], wanted: GGMLQuantizationType) -> dict[str, GGMLQuantizationType]:
    """What each tensor is written in."""
    return {name: written_type(_shape(parts), wanted, finer=name in _KEPT_FINER) for name, parts in tensors.items()}


def _form_for(model: PreTrainedModel, name: str) -> GgufForm:
    """The first architecture of llama.cpp that holds the model.

    Raises:
        UnsupportedModelError: none does; says why each cannot, and what could be done.
    """
    kind = model.config.model_type
    forms = architecture_of(model.config).gguf
    if not forms or model.get_output_embeddings() is None:
        known = "" if forms else f"there is no data for {kind}; "
        raise UnsupportedModelError(
            f"{name}: cannot be written as GGUF: {known}only causal models with separate q, k and v can. Prune it "
            "without --per-block: convert_hf_to_gguf.py of llama.cpp reads the folder."
        )
    if other_activation(model.config):
        raise UnsupportedModelError(
            f"{name}: llama.cpp computes SiLU in the FFN of such models, and this one says "
            f"{other_activation(model.config)!r}: no architecture of llama.cpp holds it."
        )
    reasons = []
    for form in forms:
        why = _why_not(model, form)
        if why is None:
            return form
        reasons.append(f"{form.name} {why}")
    raise UnsupportedModelError(
        f"{name}: no architecture of llama.cpp holds it: {'; '.join(reasons)}. Prune it with --uniform."
    )


def _why_not(model: PreTrainedModel, form: GgufForm) -> str | None:
    """What keeps one architecture from holding the model."""
    if gone_sites(model):
        return f"has heads and an FFN in every block, here {', '.join(gone_sites(model))} have none"
    sizes = _sizes(model)
    config = model.config
    uneven = next((name for name, values in sizes.items() if len(set(values)) > 1), None)
    if uneven and not form.per_block:
        return f"has one {uneven} for all blocks, here are {min(sizes[uneven])} to {max(sizes[uneven])}"
    heads, head_dim = sizes["head_count"][0], _head_dim(model)
    if not form.head_dim and heads * head_dim != config.hidden_size:
        return f"takes the size of a head from {config.hidden_size} / {heads} heads, here it is {head_dim}"
    if form.fused and not config.tie_word_embeddings:
        return "has its output tied to its embeddings, this model has not"
    if not form.biases and any(name.endswith(".bias") for name, _ in model.named_parameters()):
        return "has no biases, this model has: prune with --for llama.cpp, and repairs add none"
    return None


def _sizes(model: PreTrainedModel) -> dict[str, list[int]]:
    """Head counts and FFN widths per block, by the names that GGUF has for them."""
    found: dict[str, list[int]] = {"head_count": [], "head_count_kv": [], "feed_forward_length": []}
    for site in find_sites(model):
        measures = site.measures(site.n_units)
        if site.spec.probabilities is None:
            found["feed_forward_length"].append(measures["units"])
        else:
            found["head_count"].append(measures["queries"])
            found["head_count_kv"].append(measures["kv_heads"])
    return found


def _head_dim(model: PreTrainedModel) -> int:
    return next(site.head_dim for site in find_sites(model))


def _add_sizes(writer: GGUFWriter, model: PreTrainedModel) -> list[str]:
    """Write the hyperparameters; gives back what the user should know.

    Raises:
        UnsupportedModelError: rotary embeddings are scaled in a way that is not known here.
    """
    config, head_dim, notes = model.config, _head_dim(model), []
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window and window < context:
        notes.append(f"llama.cpp has no sliding window for this architecture, so the context ends at {window} tokens")
        context = window
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    sizes = {name: values if len(set(values)) > 1 else values[0] for name, values in _sizes(model).items()}
    writer.add_head_count(sizes["head_count"])
    writer.add_head_count_kv(sizes["head_count_kv"])
    writer.add_feed_forward_length(sizes["feed_forward_length"])
    kind = config.rope_parameters.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    elif kind not in ("default", "llama3"):
        raise UnsupportedModelError(
            f"rotary embeddings of kind {kind!r} cannot be written as GGUF here: default, linear and llama3 can."
        )
    return notes


def _add_parent(writer: GGUFWriter, path: Path, model: PreTrainedModel) -> None:
    """Take over the vocabulary and every other key of the dense model's file that is not written already.

    Raises:
        CheckpointError: it is the file of another model.
    """
    fields = GGUFReader(path).fields
    kind = fields["general.architecture"].contents()
    tokens = fields.get("tokenizer.ggml.tokens")
    wanted = {"block_count": model.config.num_hidden_layers, "embedding_length": model.config.hidden_size}
    found = {name: fields[f"{kind}.{name}"].contents() for name in wanted if f"{kind}.{name}" in fields}
    rows = len(tokens.data) if tokens is not None else 0
    if found != wanted or rows != model.config.vocab_size:
        raise CheckpointError(
            f"{path}: not the parent of this model: {found} and {rows} tokens there, {wanted} and "
            f"{model.config.vocab_size} tokens here. Give the .gguf file of the dense model."
        )
    skipped = {"general.architecture", "general.file_type", "general.quantization_version", "general.size_label"}
    for field in fields.values():
        inside = field.name.removeprefix(f"{kind}.")
        name = field.name if inside == field.name else f"{writer.arch}.{inside}"
        if field.name.startswith(("GGUF.", "split.")) or name in skipped or name in writer.kv_data[0]:
            continue
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)


def _tensors(model: PreTrainedModel, form: GgufForm, read: Callable[[str], Tensor]) -> dict[str, list[_Piece]]:
    """The parameters that make up each tensor of the file, by its name there.

    Raises:
        UnsupportedModelError: llama.cpp has no place for one of them.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    own = architecture_of(model.config).gguf[0].name
    places = gguf.get_tensor_name_map(kinds[own], model.config.num_hidden_layers)
    found: dict[str, list[_Piece]] = {}
    for name, parameter in model.named_parameters():
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise UnsupportedModelError(f"GGUF has no place for {name} in the architecture {form.name}.")
        if form.fused:
            for part in ("attn_q.", "attn_k.", "attn_v."):
                place = place.replace(part, "attn_qkv.")
        found.setdefault(place, []).append(_Piece(shape=tuple(parameter.shape), read=partial(read, name)))
    factors = _rope_factors(model)
    if factors is None:
        return found
    return {"rope_freqs.weight": [_Piece(shape=tuple(factors.shape), read=lambda: factors)], **found}


def _rope_factors(model: PreTrainedModel) -> Tensor | None:
    """By what each rotary frequency is divided, where that differs between frequencies."""
    rope = model.config.rope_parameters
    if rope.get("rope_type") != "llama3":
        return None
    scaled = next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")).double().cpu()
    half = len(scaled)
    plain = torch.pow(rope["rope_theta"], -torch.arange(half, dtype=torch.float64) / half)
    factors: Tensor = (plain / scaled).float()
    return factors


def _array(name: str, parts: list[_Piece], form: GgufForm, head_dim: int) -> Float[np.ndarray, "..."]:
    """A tensor as it stands in the file, before its type; q and k in pairs of neighbors where llama.cpp wants that."""
    arrays = [part.read().detach().float().cpu().numpy() for part in parts]
    if form.pairs and any(part in name for part in (".attn_q.", ".attn_k.")):
        arrays = [a.reshape(-1, 2, head_dim // 2, *a.shape[1:]).swapaxes(1, 2).reshape(a.shape) for a in arrays]
    return np.ascontiguousarray(np.concatenate(arrays))


def _shape(parts: list[_Piece]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _odd_rows(
    tensors: dict[str, list[_Piece]], types: dict[str, GGMLQuantizationType], wanted: GGMLQuantizationType
) -> list[str]:
    odd = [name for name, kind in types.items() if kind == GGMLQuantizationType.F16 != wanted]
    if not odd:
        return []
    rows = sorted({_shape(tensors[name])[-1] for name in odd})
    return [
        f"{len(odd)} matrices are f16, because their rows ({rows[0]} to {rows[-1]} entries) are no multiple of "
        f"{BLOCK}: prune with --multiple-of {BLOCK} for smaller files"
    ]


def _head(writer: GGUFWriter, tensors: Mapping[str, list[_Piece]], types: Mapping[str, GGMLQuantizationType]) -> bytes:
    """All that comes before the first tensor: metadata, and each tensor's name, shape, type and place."""
    for name, parts in tensors.items():
        shape = _shape(parts)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _bytes(shape, types[name]), types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert writer.path is not None
    head = writer.path.read_bytes()
    writer.path.unlink()
    return _aligned(head, writer.data_alignment)


def _parts(
    writer: GGUFWriter,
    tensors: Mapping[str, list[_Piece]],
    types: Mapping[str, GGMLQuantizationType],
    model: PreTrainedModel,
    form: GgufForm,
) -> list[Part]:
    """Every tensor as it stands in the file, each made when it is asked for."""
    head_dim, align = _head_dim(model), writer.data_alignment

    def content(name: str) -> bytes:
        array = _array(name, tensors[name], form, head_dim)
        if types[name] == GGMLQuantizationType.F16 and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
            raise CheckpointError(
                f"{name} has values beyond {np.finfo(np.float16).max}, which f16 cannot hold: use bf16."
            )
        return _aligned(gguf.quantize(array, types[name]).tobytes(), align)

    def size(name: str) -> int:
        return int(GGUFWriter.ggml_pad(_bytes(_shape(tensors[name]), types[name]), align))

    return [Part(name=name, bytes=size(name), make=partial(content, name)) for name in tensors]


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // int(per_block) * int(size)


def _aligned(content: bytes, align: int) -> bytes:
    return content.ljust(GGUFWriter.ggml_pad(len(content), align), b"\0")


def _read_back(
    path: Path,
    tensors: dict[str, list[_Piece]],
    types: dict[str, GGMLQuantizationType],
    model: PreTrainedModel,
    form: GgufForm,
    progress: Progress,
) -> None:
    """Raise unless the file holds every tensor, in its shape, with its values within the precision of its type."""
    stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if stored.keys() != tensors.keys():
        raise CheckpointError(f"{path.name}: tensors are missing in the file that was written; nothing was kept")
    head_dim = _head_dim(model)
    for n, (name, parts) in enumerate(tensors.items(), start=1):
        wanted = _array(name, parts, form, head_dim)
        found = gguf.dequantize(stored[name].data, stored[name].tensor_type).reshape(wanted.shape)
        if (
            stored[name].tensor_type != types[name]
            or (np.abs(found - wanted) > largest_error(wanted, types[name])).any()
        ):
            raise CheckpointError(f"{path.name}: {name} holds other values than the model; nothing was kept")
        progress("reading back", n, len(tensors))


def largest_error(values: Float[np.ndarray, "..."], kind: GGMLQuantizationType) -> Float[np.ndarray, "..."]:
    """The largest error that storing each value in a type may make."""
    sizes: Float[np.ndarray, ...] = np.abs(values)
    if kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        largest = sizes.reshape(-1, BLOCK).max(axis=1, keepdims=True)
        step = 0.57 / 127 if kind == GGMLQuantizationType.Q8_0 else 1.01 / 8
        return np.broadcast_to(largest * step + 1e-7, (largest.size, BLOCK)).reshape(values.shape)
    relative = {GGMLQuantizationType.F32: 0.0, GGMLQuantizationType.F16: 2**-11, GGMLQuantizationType.BF16: 2**-8}[kind]
    return sizes * relative + (6e-8 if relative else 0.0)
