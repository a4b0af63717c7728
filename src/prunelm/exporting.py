"""A model written in another program's format, by the format's name."""

from pathlib import Path
from typing import Any

from .decilm_export import export_decilm
from .errors import CheckpointError
from .exported import Exported
from .gguf_export import export_gguf
from .onnx_export import export_onnx
from .padding import export_padded
from .progress import Progress, silent
from .registry import did_you_mean
from .torchao_export import export_torchao
from .writing import writes

FORMATS = {
    "gguf": export_gguf,
    "nemotron-nas": export_decilm,
    "onnx": export_onnx,
    "padded": export_padded,
    "torchao-int8": export_torchao,
}


@writes
def export(
    model: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    type: str | None = None,
    parent: str | Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a model in another program's format, checked before this returns.

    What was interrupted after more than a minute goes on when it is asked for again.

    Args:
        model: a folder that `prune` wrote, or any model that it accepts.
        out: file (gguf) or folder (all others) to write.
        format: `gguf` for llama.cpp (by default where `out` ends in .gguf), `nemotron-nas` for vLLM's own DeciLM and
            what reads such folders, `onnx`, `padded`: zeros up to the widest block, so that stock classes open it, or
            `torchao-int8`: int8 weights, for transformers with torchao.
        type: of the matrices of a .gguf file: f32, f16 (by default), bf16, q8_0 or q4_0.
        parent: the dense model's .gguf file, from which a .gguf file takes its vocabulary and metadata.
        force: replace `out` if it exists.
        progress: told about every tensor of a .gguf file, else when files are written and when they are proven.

    Raises:
        CheckpointError: no such format or type, or it would compute something else; nothing was kept.
        OutputError: it cannot be written.
        ResumeError: `out` has the unfinished work of another export, or of another model; says what differs.
        UnsupportedModelError: the format cannot hold the model; says which blocks, and what would do.
    """
    chosen = format or ("gguf" if Path(out).suffix == ".gguf" else None)
    if chosen not in FORMATS:
        got = "none is given" if chosen is None else f"got {chosen!r}. {did_you_mean(chosen, FORMATS)}".rstrip()
        raise CheckpointError(
            f"format must be one of {', '.join(FORMATS)}, {got}. A name that ends in .gguf says gguf."
        )
    options: dict[str, Any] = {k: v for k, v in {"type": type, "parent": parent}.items() if v is not None}
    if options and chosen != "gguf":
        raise CheckpointError(f"{' and '.join(f'--{name}' for name in options)} is for .gguf files: leave it out.")
    return FORMATS[chosen](model, out, force=force, progress=progress, **options)
