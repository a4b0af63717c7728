"""Fixtures that every test may use: a byte tokenizer, tiny models in folders, a text, and the command line."""

import os
import sys

if any(word == "gpu" or "tests/gpu" in word for word in sys.argv):
    os.environ["PRUNELM_TESTS_ON_GPU"] = "1"  # processes that share the tests do not see the command line
if "PRUNELM_TESTS_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # messages and bytes are those of the CPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # For tiny models a second thread costs more than it brings.
os.environ["COLUMNS"] = "160"
os.environ["FORCE_COLOR"] = ""
os.environ["TTY_COMPATIBLE"] = "0"
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"

import contextlib
import importlib.util
import io
import platform
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
import transformers
from hypothesis import settings
from tests import forked
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from prunelm.cli import SIGNALS, main
from prunelm.testing import tiny_model

torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("repeatable")
logging.set_verbosity_error()
logging.disable_progress_bar()

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")
VOCAB_SIZE = 300
POSITIONS = 128
WORDS = (
    "the a of to and in is it was for that with as on be at by this had not are but from or have an they which one "
    "you were her all she there would their we him been has when who will more no if out so said what up its about "
    "river mountain engine letter window garden paper winter summer morning evening teacher doctor captain village "
    "quick slow bright heavy quiet narrow golden silver ancient modern simple curious patient careful walked opened "
    "carried followed answered remembered built measured painted counted returned waited listened"
)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The versions, and what the run leaves out by default."""
    versions = f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if "not slow" not in config.option.markexpr:
        return [versions]
    files = sorted(Path(__file__).parent.rglob("test_*.py"))
    found = {path.stem: path.read_text(encoding="utf-8").count("pytest.mark.slow") for path in files}
    named = ", ".join(name for name, count in found.items() if count)
    return [versions, f"left out: {sum(found.values())} slow tests (make slow) in {named}; tests/gpu (pytest -m gpu)"]


def make_byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte after five special ones; with `adds_bos` it puts <bos> before every text by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
        clean_up_tokenization_spaces=False,
    )


def pseudo_english(size: int, seed: int = 0) -> str:
    """Deterministic sentences of known words, `size` characters of them."""
    chooser = random.Random(seed)
    sentences, length = [], 0
    while length < size:
        words = chooser.choices(WORDS.split(), k=chooser.randint(5, 14))
        sentences.append(" ".join(words).capitalize() + chooser.choice((". ", ". ", "? ", ".\n")))
        length += len(sentences[-1])
    return "".join(sentences)[:size]


@pytest.fixture(scope="session", autouse=True)
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Unfinished work without a place of its own lies in a temporary folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("states")))
        yield


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(
    byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A function (name of a tiny model, **overrides) -> its folder with a tokenizer, made once; do not write there."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def folder(name: str, **overrides: Any) -> Path:
        key = "-".join([name, *(f"{field}={value}" for field, value in sorted(overrides.items()))])
        if key not in made:
            options = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": POSITIONS, **overrides}
            made[key] = root / key
            tiny_model(name, **options).save_pretrained(made[key])
            byte_tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 kB of pseudo-English."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(pseudo_english(40_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def forked_proofs() -> Iterator[None]:
    """Folders prove themselves in a forked process, but for those of commands that run in a process of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunelm.checkpoint.verified", forked.verified)
        yield


@pytest.fixture(scope="session")
def run_cli() -> Callable[..., Ran]:
    """A function (*arguments) -> what `python -m prunelm` did with them in a fresh process without a terminal."""

    def run(*args: object) -> Ran:
        command = [sys.executable, "-m", "prunelm", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
        return Ran(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture(scope="session")
def forked_cli() -> Callable[..., Ran]:
    """The same in a process forked from one that has imported the libraries; see `tests.forked`."""

    def run(*args: object) -> Ran:
        done = forked.run("-m", "prunelm", *map(str, args))
        return Ran(code=done.returncode, out=done.stdout, err=done.stderr)

    return run


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ran]:
    """A function (*arguments) -> what `prunelm.cli.main` did with them in this process; a fault of ours is raised."""

    def run(*args: object) -> Ran:
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv, hook, handlers = sys.argv, sys.excepthook, {number: signal.getsignal(number) for number in SIGNALS}
        sys.argv = ["prunelm", *map(str, args)]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv, sys.excepthook = argv, hook
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Ran(code=code, out=out.getvalue(), err=err.getvalue())

    return run


@pytest.fixture(scope="session")
def per_block(
    cli: Callable[..., Ran], tiny_folder: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pruned folder whose blocks have different widths; do not write there."""
    out = tmp_path_factory.mktemp("pruned") / "per-block"
    recipe = ("--sparsity", "0.27", "--per-block", "--allocator", "per-module", "--multiple-of", "1")
    size = ("--text", text_file, "--samples", "8", "--length", "32")
    ran = cli("prune", tiny_folder("llama"), out, *recipe, *size)
    assert ran.code == 0, ran
    return out


@pytest.fixture
def without_type_checks() -> Iterator[None]:
    """The test run's checks of argument types stay off, as they are for a user."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; tests that ask for it are skipped where it or playwright is missing."""
    places = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    executable = next((place for place in places if place), None)
    if executable is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no Chromium, or no playwright, on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        opened = started.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield opened
        opened.close()
