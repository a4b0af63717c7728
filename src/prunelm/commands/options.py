"""Options that several commands have, each declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ..workflow import DEFAULT_RECIPE

Model = Annotated[str, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")]
MaybeModel = Annotated[str | None, typer.Argument(help="Hugging Face folder, hub name, or .gguf file.")]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
MaybeFolder = Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable JSON.")]
Resume = Annotated[
    Path | None, typer.Option(metavar="OUT", help="Finish the interrupted run into OUT; say nothing else.")
]

Sparsity = Annotated[float, typer.Option(help="Share of the prunable parameters to remove.")]
Params = Annotated[str | None, typer.Option(help="Budget: at most so many parameters, as in 1.0B.")]
Fit = Annotated[str | None, typer.Option(help="Budget: bytes of weights in a format and cache, as in 8GB@q4_k_m+8k.")]
Faster = Annotated[str | None, typer.Option("--speedup", help="Budget: measured speed, as in 1.5, or 1.5@decode.")]

RecipeName = Annotated[str, typer.Option(help="Recipe name or .toml file.")]
MaybeRecipe = Annotated[
    str | None, typer.Option(help=f"Recipe name or .toml file; {DEFAULT_RECIPE} by default, best with --per-block.")
]
Calibrated = Annotated[Path | None, typer.Option(help="Folder of prunelm calibrate, to skip that pass.")]
JournalFile = Annotated[Path | None, typer.Option(help="File that lets an interrupted search go on.")]
Allocator = Annotated[str | None, typer.Option(help="Replace the recipe's allocator.")]
Targets = Annotated[
    str | None,
    typer.Option("--for", help="Programs that must open it: transformers, vllm, llama.cpp (several, or any)."),
]
Parallel = Annotated[int | None, typer.Option(help="Devices that heads and channels divide over.")]
Unit = Annotated[str | None, typer.Option(help="A unit of attention: group or query.")]
Sites = Annotated[str | None, typer.Option(help="attention, ffn, or attention,ffn.")]
Blocks = Annotated[str | None, typer.Option(help="Blocks that may lose units, as in 4:-2.")]
Hidden = Annotated[float | None, typer.Option(help="Share of the residual stream's channels to remove.")]
Multiple = Annotated[int | None, typer.Option(help="Kept FFN channels are a multiple of this.")]

Text = Annotated[Path | None, typer.Option(help="Text file, .jsonl with a text field, or folder of them.")]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences.")]
SampleLength = Annotated[int | None, typer.Option(help="Tokens in a calibration sequence.")]
MaybeSeed = Annotated[int | None, typer.Option(help="For everything random.")]
Seed = Annotated[int, typer.Option(help="For everything random.")]
Length = Annotated[int, typer.Option(help="Tokens in an evaluation window.", min=2)]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens of text.", min=2)]

Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, mps, or auto: blocks on all GPUs. By default a GPU of CUDA where there is one."
    ),
]
ComputeDtype = Annotated[str, typer.Option(help="Of the model while it is pruned: float32, bfloat16, float16.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Only algorithms that give the same bits every time, on GPUs too.")
]


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a checkpoint may do when it is opened."""

    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept pickle weights, which can run any code.")
    ] = False
