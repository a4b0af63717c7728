"""Write a model as nemotron-nas (DeciLM): a width for each block in vLLM's own class, SGLang, TensorRT-LLM and mlx-lm.

All blocks have the same number of query heads there; key/value heads and FFN widths may differ, and sublayers may be
missing. The folder carries a config class of our own, because readers want attributes where JSON has tables.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import copy_tokenizer, legacy_rope
from .errors import CheckpointError, UnsupportedModelError
from .export_files import exported_folder
from .exported import Exported, bytes_of
from .hidden import built_width
from .loading import find_model, load_model, load_tokenizer
from .progress import Progress, silent
from .sites import (
    Site,
    architecture_of,
    bias_of,
    find_blocks,
    find_sites,
    gone_sites,
    other_activation,
    weight_of,
)
from .targets import blocks_in_words

GRAPH = "deci"
"""llama.cpp's name of what DeciLM computes; families that it can hold can be written here."""
MULTIPLE = 256
"""Readers round widths that are said by `ffn_mult` up to a multiple of this."""
CONFIG_CODE = "configuration_decilm.py"
_COPIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_hidden_layers",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
_NORMS = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}


def export_decilm(model: str | Path, out: str | Path, *, force: bool = False, progress: Progress = silent) -> Exported:
    """Write a model as a nemotron-nas folder, every value of which is read back before this returns.

    Args:
        model: a folder that `prune` wrote, or any model that it accepts.
        out: folder to write.
        force: replace `out` if it exists.
        progress: told when the files are written, and when they are proven.

    Raises:
        CheckpointError: a value came back differently.
        OutputError: it cannot be written.
        UnsupportedModelError: the family, or these widths, cannot be said; names the blocks.
    """
    source = find_model(model, device="cpu")
    loaded = load_model(source, dtype=None)
    _check_holds(loaded, source.name)
    config, notes = _config(loaded)
    tensors = _tensors(loaded, config)
    size = sum(value.numel() * value.element_size() for value in tensors.values())

    def write(folder: Path) -> None:
        save_torch_state_dict(tensors, folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        code = resources.files(__package__).joinpath("decilm_template.txt").read_text(encoding="utf-8")
        (folder / CONFIG_CODE).write_text(code, encoding="utf-8")
        copy_tokenizer(source, load_tokenizer(source) if source.gguf else None, folder)

    with exported_folder(
        out, source, write, format="nemotron-nas", force=force, need_bytes=size, progress=progress
    ) as folder:
        _read_back(folder, tensors, config)
        written = bytes_of(folder)
    return Exported(
        path=Path(out),
        architecture="nemotron-nas",
        type=str(loaded.dtype).removeprefix("torch."),
        bytes=written,
        proof="every value read back",
        notes=notes,
    )


def _check_holds(model: PreTrainedModel, name: str) -> None:
    """Raise unless DeciLM computes what the model does, with these widths.

    Raises:
        UnsupportedModelError: says why not, with the blocks, and what would do.
    """
    kind = model.config.model_type
    if GRAPH not in [form.name for form in architecture_of(model.config).gguf] or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name}: nemotron-nas computes what causal Llama, Mistral and Qwen2 do, not {kind}. Write it as "
            "--format padded, or prune it with --uniform."
        )
    if other_activation(model.config):
        raise UnsupportedModelError(
            f"{name}: nemotron-nas computes SiLU in the FFN, and this model says {other_activation(model.config)!r}: "
            "write it as --format padded."
        )
    if built_width(model) is not None:
        raise UnsupportedModelError(f"{name}: it has lost hidden channels too, and only prunelm.load opens that.")
    heads: dict[int, list[int]] = {}
    for site in _of(model, "attention").values():
        heads.setdefault(site.measures(site.n_units)["queries"], []).append(site.block)
    if len(heads) > 1:
        said = ", ".join(f"{n} in {blocks_in_words(where)}" for n, where in sorted(heads.items()))
        raise UnsupportedModelError(
            f"{name}: nemotron-nas has one number of query heads for all blocks, here are {said}. Prune with --sites "
            "ffn or --uniform, or write it as --format padded or as a .gguf file."
        )
    first = [key for key in gone_sites(model) if key == "0.attention"]
    if first:
        raise UnsupportedModelError(f"{name}: nemotron-nas needs attention in block 0, which has lost it.")


def _of(model: PreTrainedModel, name: str) -> dict[int, Site]:
    """The sites of a kind, by block."""
    return {site.block: site for site in find_sites(model) if site.name == name}


def _config(model: PreTrainedModel) -> tuple[dict[str, Any], list[str]]:
    """What config.json says, and what the user should know."""
    own, attention, ffn = model.config, _of(model, "attention"), _of(model, "ffn")
    queries = next(iter(attention.values())).measures(next(iter(attention.values())).n_units)["queries"]
    head_dim = next(iter(attention.values())).head_dim
    raw = {name: value for name, value in own.to_dict().items() if name in _COPIED}
    odd = [block for block, site in ffn.items() if site.n_units % MULTIPLE]
    notes = []
    if odd:
        notes.append(
            f"FFN widths of {blocks_in_words(odd)} are no multiple of {MULTIPLE}, so they are written as "
            f"intermediate_size, which vLLM reads; SGLang, TensorRT-LLM and mlx-lm need --multiple-of {MULTIPLE}"
        )
    if queries * head_dim != own.hidden_size:
        notes.append(
            f"{queries} heads of size {head_dim} are not the hidden size {own.hidden_size}: vLLM reads head_dim, "
            "mlx-lm does not"
        )
    window = getattr(own, "sliding_window", None)
    if window and window < own.max_position_embeddings:
        notes.append(f"DeciLM has no sliding window, so the context ends at {window} tokens")
        raw["max_position_embeddings"] = window
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        **raw,
        **legacy_rope(raw, {}),
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(CONFIG_CODE).stem}.DeciLMConfig"},
        "attention_bias": _has_bias(attention.values()),
        "mlp_bias": _has_bias(ffn.values()),
        "dtype": dtype,
        "torch_dtype": dtype,
        "head_dim": head_dim,
        "num_attention_heads": queries,
        "num_key_value_heads": None,
        "intermediate_size": max((site.n_units for site in ffn.values()), default=0),
        "block_configs": [
            {"attention": _attention_block(attention.get(i), queries), "ffn": _ffn_block(ffn.get(i), own, bool(odd))}
            for i in range(own.num_hidden_layers)
        ],
    }, notes


def _has_bias(sites: Any) -> bool:
    return any(bias_of(slot.layer) is not None for site in sites for slot in (*site.producers, site.consumer))


def _attention_block(site: Site | None, queries: int) -> dict[str, Any]:
    group = None if site is None else queries // site.measures(site.n_units)["kv_heads"]
    return {"no_op": site is None, "replace_with_linear": False, "n_heads_in_group": group}


def _ffn_block(site: Site | None, config: Any, odd: bool) -> dict[str, Any]:
    block: dict[str, Any] = {"no_op": site is None, "replace_with_linear": False}
    if site is None:
        return {**block, "ffn_mult": None}
    if odd:
        return {**block, "intermediate_size": site.n_units}
    return {**block, "ffn_mult": 1.5 * site.n_units / config.hidden_size}


def width_of(block: Mapping[str, Any], hidden_size: int) -> int:
    """The FFN width that readers make of a block's table."""
    ffn = block["ffn"]
    if ffn["no_op"]:
        return 0
    if "ffn_mult" not in ffn:
        return int(ffn["intermediate_size"])
    width = int(2 * ffn["ffn_mult"] * hidden_size / 3)
    return width + -width % MULTIPLE


@torch.no_grad()
def _tensors(model: PreTrainedModel, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights by name: without those of missing sublayers, with zeros for biases that only some layers have."""
    prefix, _ = find_blocks(model)
    gone = [f"{prefix}.{key.split('.')[0]}." for key in gone_sites(model)]
    left_out = tuple(_missing(model, prefix)) if gone else ()
    found = {name: p.detach().contiguous() for name, p in model.named_parameters() if not name.startswith(left_out)}
    for site in find_sites(model):
        if config["attention_bias" if site.spec.probabilities is not None else "mlp_bias"]:
            for slot in (*site.producers, site.consumer):
                weight = weight_of(slot.layer)
                found.setdefault(f"{slot.path}.bias", weight.new_zeros(weight.shape[0]))
    return found


def _missing(model: PreTrainedModel, prefix: str) -> Iterator[str]:
    """Beginnings of the names of weights that belong to sublayers without units.

    Raises:
        UnsupportedModelError: such a sublayer still gives a bias, which a missing one does not.
    """
    for key, spec in gone_sites(model).items():
        block = f"{prefix}.{key.split('.')[0]}"
        bias = bias_of(model.get_submodule(f"{block}.{spec.consumer[0]}"))
        if bias is not None and bool(bias.any()):
            raise UnsupportedModelError(f"{key} has no units but a bias, and a missing sublayer gives nothing.")
        yield f"{block}.{spec.consumer[0].split('.')[0]}."
        yield f"{block}.{_NORMS[spec.name]}."


def _read_back(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Raise unless the folder holds every tensor, and readers make the right widths of its config."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    same = stored.keys() == tensors.keys() and all(torch.equal(stored[name], tensors[name]) for name in tensors)
    widths = _said_widths(tensors, config["block_configs"], config["hidden_size"])
    if not same or not widths:
        raise CheckpointError(f"{folder.name}: it holds other values than the model; nothing was kept")


def _said_widths(tensors: Mapping[str, Tensor], blocks: Sequence[Mapping[str, Any]], hidden_size: int) -> bool:
    rows = [
        [value.shape[0] for name, value in tensors.items() if f".{i}.mlp.gate_proj.weight" in name]
        for i in range(len(blocks))
    ]
    return [sum(found) for found in rows] == [width_of(block, hidden_size) for block in blocks]
