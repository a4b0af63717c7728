"""Write a model as a folder with int8 weights of torchao, which plain transformers opens where torchao is installed."""

import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from .checkpoint import copy_tokenizer, legacy_rope
from .errors import CheckpointError, UnsupportedModelError
from .export_files import exported_folder
from .exported import Exported, bytes_of
from .loading import Source, find_model, load_model, load_tokenizer, read_json
from .per_block import carries_code, modeling_file
from .progress import Progress, silent
from .sites import architecture_of
from .stream import prediction
from .verify import TOLERANCE, proof_inputs

TOKENS = 24


def export_torchao(model: str | Path, out: str | Path, *, force: bool = False, progress: Progress = silent) -> Exported:
    """Write a model with the weights of its linear layers in int8, a scale for each row; all others keep their dtype.

    Args:
        model: a folder that `prune` wrote, or any model that it accepts.
        out: folder to write; transformers opens it with torchao installed, one with uneven blocks by the code in it.
        force: replace `out` if it exists.
        progress: told when the files are written, and when they are proven.

    Raises:
        CheckpointError: torchao is missing, or the folder gives other logits when it is opened; nothing was kept.
        OutputError: it cannot be written.
        UnsupportedModelError: only prunelm.load can build the model.
    """
    if importlib.util.find_spec("torchao") is None:
        raise CheckpointError("int8 needs torchao: pip install 'prunelm[torchao]'.")
    source = find_model(model, device="cpu")
    floats = load_model(source, dtype=None)
    uneven = (source.plan() or {}).get("loader") == "prunelm"
    if uneven and not carries_code(floats):
        raise UnsupportedModelError(
            f"{source.name}: only prunelm.load builds its narrower stream or its blocks without heads, and that reads "
            "no int8. Export the model before, or prune it without those."
        )
    size = sum(p.numel() for p in floats.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch)
        _write_floats(floats, source, plain, uneven)
        small = _opened(plain, floats, uneven, dtype=floats.dtype, quantization_config=_int8())
        config = read_json(plain / "config.json") if uneven else {}

    def write(folder: Path) -> None:
        small.save_pretrained(folder)
        raw = read_json(folder / "config.json")
        if uneven:
            raw = {**config, "quantization_config": raw["quantization_config"]}
            _write_code(floats, folder)
        raw |= legacy_rope(raw, architecture_of(floats.config).legacy_rope)
        (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_tokenizer(source, load_tokenizer(source) if source.gguf else None, folder)

    with exported_folder(
        out, source, write, format="torchao-int8", force=force, need_bytes=2 * size, progress=progress
    ) as folder:
        gap = _gap(small, _opened(folder, floats, uneven))
        if not gap <= TOLERANCE:
            raise CheckpointError(f"the int8 folder gives other logits when opened ({gap:.2e}); nothing was kept")
        moved = _gap(small, floats)
        written = bytes_of(folder)
    return Exported(
        path=Path(out),
        architecture=floats.config.model_type,
        type="int8",
        bytes=written,
        proof="opened again, same logits",
        notes=[f"int8 moves the logits of {TOKENS} fixed tokens by {moved:.3g} at most"],
    )


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _write_floats(floats: PreTrainedModel, source: Source, folder: Path, uneven: bool) -> None:
    """A folder of the float weights; one with uneven blocks as it was written, with the modeling file made anew."""
    if not uneven:
        floats.save_pretrained(folder)
        return
    for file in (*source.folder.glob("*.safetensors*"), source.folder / "config.json"):
        shutil.copyfile(file, folder / file.name)
    _write_code(floats, folder)


def _write_code(model: PreTrainedModel, folder: Path) -> None:
    name, text = modeling_file(model)
    (folder / name).write_text(text, encoding="utf-8")


def _opened(folder: Path, floats: PreTrainedModel, uneven: bool, **options: Any) -> PreTrainedModel:
    cls: Any = type(floats)
    if uneven:
        module = modeling_file(floats)[0].removesuffix(".py")
        name = read_json(folder / "config.json")["architectures"][0]
        cls = get_class_from_dynamic_module(f"{module}.{name}", str(folder))
    model: PreTrainedModel = cls.from_pretrained(folder, **options)
    return model.eval()


@torch.no_grad()
def _gap(one: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference of two models' outputs for fixed tokens."""
    ids = proof_inputs(one.config.vocab_size, TOKENS)
    return float((prediction(one(input_ids=ids)).float() - prediction(other(input_ids=ids)).float()).abs().max())
