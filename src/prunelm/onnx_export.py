"""Write a model as ONNX, through the exporter of transformers, and compare it in onnxruntime before it is kept."""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .checkpoint import copy_tokenizer
from .errors import CheckpointError, UnsupportedModelError
from .export_files import exported_folder
from .exported import Exported, bytes_of
from .loading import find_model, load_model, load_tokenizer, skeleton
from .progress import Progress, silent
from .stream import prediction
from .verify import TOLERANCE, proof_inputs

NEEDED = ("onnx", "onnxscript", "onnxruntime")
_ROWS, _TOKENS = 2, 12


def export_onnx(model: str | Path, out: str | Path, *, force: bool = False, progress: Progress = silent) -> Exported:
    """Write a model as ONNX graphs in float32, whose outputs in onnxruntime equal its own.

    A causal model gives two graphs: `prefill.onnx`, from tokens to logits and cache, and `decode.onnx`, from a token
    and that cache to the next logits and cache. Others give `model.onnx`.

    Args:
        model: a folder that `prune` wrote, or any model that it accepts.
        out: folder to write.
        force: replace `out` if it exists.
        progress: told when the files are written, and when they are proven.

    Raises:
        CheckpointError: a package is missing, or onnxruntime computes something else.
        OutputError: it cannot be written.
        UnsupportedModelError: the exporter cannot trace the model, or its attention has a sliding window.
    """
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise CheckpointError(f"ONNX needs {', '.join(absent)}: pip install 'prunelm[onnx]'.")
    source = find_model(model, device="cpu")
    _refuse_window(skeleton(source), source.name)
    loaded = load_model(source).eval()
    need = sum(p.numel() * p.element_size() for p in loaded.parameters())
    need *= 2 if loaded.can_generate() else 1

    def write(folder: Path) -> None:
        _trace(loaded, source.name).save_pretrained(folder)
        copy_tokenizer(source, load_tokenizer(source) if source.gguf else None, folder)

    with exported_folder(out, source, write, format="onnx", force=force, need_bytes=need, progress=progress) as folder:
        gap = largest_gap(loaded, folder)
        if not gap <= TOLERANCE:
            raise CheckpointError(f"onnxruntime gives other outputs (difference {gap:.2e}); nothing was kept")
        written = bytes_of(folder)
    return Exported(
        path=Path(out),
        architecture=loaded.config.model_type,
        type="float32",
        bytes=written,
        proof=f"run in onnxruntime, largest difference {gap:.1e}",
        notes=[],
    )


def _refuse_window(model: PreTrainedModel, name: str) -> None:
    """Raise where the cache is a sliding window, which the exporter's decode graph does not carry on by itself."""
    window = getattr(model.config, "sliding_window", None)
    if model.can_generate() and window:
        raise UnsupportedModelError(
            f"{name}: its attention looks back {window} tokens only, and the ONNX exporter of transformers has no such "
            "cache. For shorter texts, set sliding_window to null in its config.json where the family allows that."
        )


def _trace(model: PreTrainedModel, name: str) -> Any:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    ids = proof_inputs(model.config.vocab_size, _ROWS * _TOKENS).reshape(_ROWS, _TOKENS)
    fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    exporter = OnnxExporter()
    export = exporter.export_for_generation if model.can_generate() else exporter.export
    try:
        with _silent():
            return export(model, fed, config=OnnxConfig(dynamic=True))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        why = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise UnsupportedModelError(f"{name}: the ONNX exporter of transformers cannot trace it: {why}") from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """The exporter tells of its stages on stdout; what is an error is raised."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@torch.no_grad()
def largest_gap(model: PreTrainedModel, folder: Path) -> float:
    """Max |output in onnxruntime - output of the model|, over a text and, with a cache, one more token."""
    ids = proof_inputs(model.config.vocab_size, 3 * (_TOKENS + 5)).reshape(3, -1)
    if not model.can_generate():
        (found,) = _run(folder / "model.onnx", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:1]
        return float((found - prediction(model(input_ids=ids))).abs().max())
    places = torch.arange(ids.shape[1])[None].expand_as(ids)
    begun = _run(folder / "prefill.onnx", {"input_ids": ids[:, :-1], "position_ids": places[:, :-1]})
    after = _run(folder / "decode.onnx", {"input_ids": ids[:, -1:], "position_ids": places[:, -1:]}, begun[1:])
    wanted = prediction(model(input_ids=ids))
    gaps = (begun[0][:, -1] - wanted[:, -2], after[0][:, -1] - wanted[:, -1])
    return max(float(gap.abs().max()) for gap in gaps)


def _run(graph: Path, fed: dict[str, Tensor], cache: list[Tensor] | None = None) -> list[Tensor]:
    """The outputs of a graph; the cache fills the inputs that are not named, in order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    values = {name: value.numpy() for name, value in fed.items() if name in names}
    rest = [name for name in names if name not in values]
    values |= {name: value.numpy() for name, value in zip(rest, cache or [], strict=True)}
    return [torch.from_numpy(value) for value in session.run(None, values)]
