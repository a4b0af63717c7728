"""Fresh processes that need not start: forked from a server that has imported the libraries, and nothing of ours.

Importing torch and transformers takes seconds, and many tests write a folder that proves itself in a fresh process.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess

LIBRARIES = ["torch", "transformers", "transformers.modeling_utils", "accelerate", "safetensors.torch", "jaxtyping"]
LIBRARIES += [f"transformers.models.{family}.modeling_{family}" for family in ("llama", "mistral", "gpt2", "bert")]
TIMEOUT = 300
OWNER = os.getpid()
"""The process that may wait for the server; those that tests fork from it may not, and start processes themselves."""


@dataclass(frozen=True)
class Running:
    """A process at work, to be watched and killed; what it says is in two files of a folder."""

    process: BaseProcess
    folder: Path

    @property
    def out(self) -> str:
        """What it has said on stdout."""
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        """What it has said on stderr."""
        return (self.folder / "err").read_text(encoding="utf-8")

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code, when it has ended."""
        self.process.join(TIMEOUT)
        if self.code is None:
            self.process.kill()
            raise TimeoutError(f"not finished after {TIMEOUT} s: {self.out}{self.err}")
        return self.code


def start(folder: Path, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> Running:
    """`python WORDS` at work: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`; what it says goes to the folder."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    for name in ("out", "err"):
        (folder / name).touch()
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | dict(environment or {})
    process = context.Process(target=_child, args=(words, own, os.fspath(cwd or Path.cwd()), str(folder)))
    process.start()
    return Running(process, folder)


def run(*words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> CompletedProcess[str]:
    """What `python WORDS` did."""
    with tempfile.TemporaryDirectory() as folder:
        running = start(Path(folder), *words, cwd=cwd, environment=environment)
        return CompletedProcess(words, running.wait(), running.out, running.err)


def verified(*words: str, modules: str) -> CompletedProcess[str]:
    """In place of `prunelm.checkpoint.verified`: the same, without the start."""
    if os.getpid() != OWNER:
        command = [sys.executable, "-m", "prunelm.verify", *words]
        environment = {**os.environ, "HF_MODULES_CACHE": modules}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return run("-m", "prunelm.verify", *words, environment={"HF_MODULES_CACHE": modules})


def _child(words: tuple[str, ...], environment: dict[str, str], place: str, folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder) / name, os.O_WRONLY | os.O_APPEND), number)
    ours = [module for module in sys.modules if module.partition(".")[0] == "prunelm"]
    assert not ours, f"not a fresh process: {ours}"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which who runs the tests may have ignored
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ |= environment
    if "HF_MODULES_CACHE" in environment:  # which was read when the server imported transformers
        from transformers import dynamic_module_utils

        dynamic_module_utils.HF_MODULES_CACHE = environment["HF_MODULES_CACHE"]
    os.chdir(place)
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<code>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
