"""Write a model whose blocks differ with zeros up to the widest block: stock classes open it, but much comes back."""

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .card import LICENSE, PIPELINE, metadata, model_card
from .checkpoint import class_for, copy_tokenizer, prove_folder
from .errors import UnsupportedModelError
from .export_files import exported_folder
from .exported import Exported, bytes_of
from .finalizing import finalize
from .hidden import built_width
from .loading import PLAN_FILE, find_model, load_model, load_tokenizer, narrow_to_, widths
from .progress import Progress, silent
from .sites import Site, SiteSpec, architecture_of
from .stock import stock_config, why_relabeled

Positions = dict[tuple[str, str], Tensor]
"""By layer and axis, where the entries of a narrower axis lie in a wider one."""


def export_padded(model: str | Path, out: str | Path, *, force: bool = False, progress: Progress = silent) -> Exported:
    """Write a model whose blocks differ as a stock folder, its missing units as zeros; proven in a fresh process.

    Removed units are zero rows and columns, so the function stays the same; what was saved comes back, but for what the
    widest block saves.

    Args:
        model: a folder that `prune` wrote with widths that differ between blocks.
        out: folder to write.
        force: replace `out` if it exists.
        progress: told when the files are written, and when they are proven.

    Raises:
        CheckpointError: stock transformers computes something else.
        OutputError: it cannot be written.
        UnsupportedModelError: nothing is to be padded, or hidden channels went too.
    """
    source = find_model(model, device="cpu")
    plan = source.plan()
    small = load_model(source, dtype=None)
    if plan is None or plan.get("loader") != "prunelm":
        raise UnsupportedModelError(f"{source.name}: plain transformers opens it as it is, there is nothing to pad.")
    if built_width(small) is not None:
        raise UnsupportedModelError(f"{source.name}: it has lost hidden channels, which zeros cannot stand for.")
    config = _widest(small)
    with torch.device("meta"):
        shapes = getattr(transformers, class_for(small, config))(config)
    sizes = {name: tuple(p.shape) for name, p in shapes.named_parameters()}
    sites = widths(shapes)
    facts = _facts(plan, small, config, sizes, sites)

    def write(folder: Path) -> None:
        tensors = _padded(small, sizes, _positions(shapes, widths(small)))
        with torch.device("meta"):
            type(shapes)(config).save_pretrained(folder, state_dict=tensors)
        copy_tokenizer(source, load_tokenizer(source) if source.gguf else None, folder)
        (folder / PLAN_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        head = metadata(source.folder / "README.md", LICENSE + PIPELINE)
        (folder / "README.md").write_text(model_card(facts, head=head), encoding="utf-8")
        finalize(folder)

    need = small.dtype.itemsize * sum(torch.Size(size).numel() for size in sizes.values())
    with exported_folder(
        out, source, write, format="padded", force=force, need_bytes=need, progress=progress
    ) as folder:
        prove_folder(small, folder)
        written = bytes_of(folder)
    return Exported(
        path=Path(out),
        architecture=config.model_type,
        type=str(small.dtype).removeprefix("torch."),
        bytes=written,
        proof="loaded in a fresh process, same logits",
        notes=_notes(small, config, sizes),
    )


def _widest(model: PreTrainedModel) -> PreTrainedConfig:
    """The narrowest stock config in which every block fits.

    Raises:
        UnsupportedModelError: there is none.
    """
    choices = [_choices(model, spec) for spec in architecture_of(model.config).sites]
    for values in itertools.product(*choices):
        found = stock_config(model.config, {name: value for part in values for name, value in part.items()})
        if found is not None:
            return found
    raise UnsupportedModelError(f"{model.config.model_type}: no stock config holds its widest block.")


def _choices(model: PreTrainedModel, spec: SiteSpec) -> Iterator[dict[str, int]]:
    """Config values of one kind of site, from its widest block up to the dense model's."""
    dense, own = model.config, [sizes for key, sizes in widths(model).items() if key.endswith(f".{spec.name}")]
    if spec.probabilities is None:
        yield {name: max(sizes["units"] for sizes in own) for name in spec.config_fields}
        return
    head_dim = getattr(dense, "head_dim", None)
    if spec.stock:
        queries = dense.num_attention_heads
        kv_heads = getattr(dense, "num_key_value_heads", None) or queries
        per_kv = max(sizes["queries"] // sizes["kv_heads"] for sizes in own if sizes["kv_heads"])
        for group in range(per_kv, queries // kv_heads + 1):
            for kept in range(max(sizes["kv_heads"] for sizes in own), kv_heads + 1):
                measures = {"kv_heads": kept, "queries": kept * group}
                values = {name: measures[measure] for name, measure in spec.config_fields.items()}
                yield {**values, "head_dim": head_dim or dense.hidden_size // queries}
    yield {name: getattr(dense, name) for name in spec.config_fields}


def _positions(shapes: PreTrainedModel, wanted: Mapping[str, Mapping[str, int]]) -> Positions:
    """Where the units of a narrower model lie in a wider one; narrows the wider one's shapes."""
    found: Positions = {}

    def before(site: Site, kept: Tensor) -> None:
        for slot in (*site.producers, site.consumer):
            keep = slot.keep(kept)
            place = (slot.path, slot.axis)
            found[place] = found[place][keep] if place in found else keep

    narrow_to_(shapes, wanted, before)
    return found


@torch.no_grad()
def _padded(small: PreTrainedModel, sizes: Mapping[str, tuple[int, ...]], places: Positions) -> dict[str, Tensor]:
    """Every weight of the wider model: that of the narrower one at its place, zeros elsewhere."""
    found = {}
    for name, parameter in small.named_parameters():
        path, _, kind = name.rpartition(".")
        axes = ["out"] if kind == "bias" else ["out", "in"]
        if isinstance(small.get_submodule(path), Conv1D):
            axes.reverse()
        full = torch.zeros(sizes[name], dtype=parameter.dtype)
        index = [places.get((path, axis), torch.arange(full.shape[dim])) for dim, axis in enumerate(axes[: full.dim()])]
        if full.dim() == parameter.dim() and full.shape != parameter.shape:
            full[torch.meshgrid(*index, indexing="ij")] = parameter
        else:
            full = parameter.detach()
        found[name] = full.contiguous()
    return found


def _notes(small: PreTrainedModel, config: PreTrainedConfig, sizes: Mapping[str, tuple[int, ...]]) -> list[str]:
    before = small.num_parameters()
    after = sum(torch.Size(size).numel() for size in sizes.values())
    lost = after - before
    why = why_relabeled(small.config, config)
    return [
        f"zeros bring {before:,} parameters to {after:,}: {lost:,} of them, {lost * small.dtype.itemsize:,} bytes, are "
        "given back, in memory and in time",
        *([] if why is None else [why]),
    ]


def _facts(
    plan: Mapping[str, Any],
    small: PreTrainedModel,
    config: PreTrainedConfig,
    sizes: Mapping[str, tuple[int, ...]],
    sites: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """The pruning.json of the padded folder."""
    notes = [*plan["notes"], *_notes(small, config, sizes)]
    return {**plan, "loader": "transformers", "modeling_file": False, "widths": sites, "notes": notes}
