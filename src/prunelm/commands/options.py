"""Options that several commands have, each declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from ..workflow import DEFAULT_RECIPE, PLAIN_RECIPE

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, hub name, or .gguf file.")]
MaybeModel = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Hugging Face folder, hub name, or .gguf file.")
]
Folder = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")]
MaybeFolder = Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="OUT", help="Finish the interrupted run that was writing OUT; takes no other options."),
]

Sparsity = Annotated[float, typer.Option(help="Share of the weights in the blocks to remove, between 0 and 1.")]
Params = Annotated[
    str | None, typer.Option(help="Instead of --sparsity: at most this many parameters stay, e.g. 1.0B.")
]
Fit = Annotated[
    str | None,
    typer.Option(help="Instead: weights in a format, and the cache of a context, fit into bytes, e.g. 8GB@q4_k_m+8k."),
]
Faster = Annotated[
    str | None,
    typer.Option(
        "--speedup",
        help="Instead: this many times as fast as the dense model, as measured here, e.g. 1.5 or 1.5@decode.",
    ),
]

RecipeName = Annotated[str, typer.Option(help="Name of a recipe (prunelm list recipes), or a .toml file.")]
MaybeRecipe = Annotated[
    str | None,
    typer.Option(
        help="Name of a recipe (prunelm list recipes), or a .toml file. "
        f"Default: {DEFAULT_RECIPE}; best with --per-block; {PLAIN_RECIPE} where no search is possible; with "
        "--calibrated, that of the calibration."
    ),
]
Calibrated = Annotated[
    Path | None, typer.Option(help="Folder that prunelm calibrate wrote: saves looking at the dense model again.")
]
JournalFile = Annotated[
    Path | None, typer.Option(help="File in which a search keeps its state, so that an interrupted one can go on.")
]
Allocator = Annotated[
    str | None, typer.Option(help="How the budget is divided, instead of the recipe's way (prunelm list allocators).")
]
Targets = Annotated[
    str | None,
    typer.Option(
        "--for", help="Programs that must open the result: transformers, vllm, llama.cpp (several with commas), or any."
    ),
]
Parallel = Annotated[
    int | None, typer.Option(help="Number of devices over which heads and channels must divide evenly.")
]
Unit = Annotated[
    str | None,
    typer.Option(help="What attention loses: group (whole KV groups) or query (as many query heads of every group)."),
]
Sites = Annotated[str | None, typer.Option(help="What may lose units: attention, ffn, or attention,ffn.")]
Blocks = Annotated[
    str | None,
    typer.Option(help="Blocks that may lose units, as a slice: 4:-2 spares the first four and the last two."),
]
Hidden = Annotated[
    float | None,
    typer.Option(help="Share of the hidden size (residual stream) to remove first; counts towards --sparsity."),
]
Multiple = Annotated[
    int | None,
    typer.Option(help="FFN widths are a multiple of this. Default: 16, or 128 from 1B parameters on; see --for."),
]

Text = Annotated[
    Path | None, typer.Option(help="Text file (.txt, .md), .jsonl with a field text, or a folder of these.")
]
Samples = Annotated[int | None, typer.Option(help="Number of calibration sequences.")]
SampleLength = Annotated[int | None, typer.Option(help="Tokens in each calibration sequence.")]
MaybeSeed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**32 - 1)]
Length = Annotated[int, typer.Option(help="Tokens in each evaluation window.", min=2)]
MaxTokens = Annotated[int | None, typer.Option(help="Stop after this many tokens of text.", min=2)]

Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, or auto (blocks over all GPUs). Default: a CUDA GPU, if there is one."),
]
ComputeDtype = Annotated[
    str, typer.Option(help="Data type of the model while it is pruned: float32, bfloat16 or float16.")
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Use only algorithms that give the same bits every time, on GPUs too.")
]


@dataclass(frozen=True, kw_only=True)
class Access:
    """What a checkpoint may do when it is opened."""

    PANEL: ClassVar = "Trust in the checkpoint"

    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run modeling code that comes with the checkpoint.")
    ] = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Accept pickle weights, which can run any code.")
    ] = False

    @property
    def words(self) -> list[str]:
        """The options that say it."""
        return [f"--{name.replace('_', '-')}" for name, allowed in vars(self).items() if allowed]
