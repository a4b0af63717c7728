"""The command line as a process: what starts it, the processes that share it, and the ways in which it ends."""

import contextlib
import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

from .commands import COMMANDS
from .commands.console import err, out
from .commands.grouping import grouped
from .errors import PruneLMError
from .heap import return_large

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make transformer language models smaller by structured pruning, without retraining.",
)
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""What ends a run early, and is answered in one line."""
SHARED = ("prune", "calibrate", "repair")
"""Commands that several processes share."""


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command stand before its name."""


for name, command in COMMANDS.items():
    app.command(name)(grouped(command))


class _Interrupted(BaseException):
    """Ctrl-C or another signal, under a name that the command-line library does not answer by itself."""


def _terminated(signum: int, _frame: Any) -> NoReturn:
    """Leave once; further signals of these kinds do not disturb the cleaning up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise _Interrupted(signum)


def _fail(line: str, status: int) -> NoReturn:
    """Say why, as far as anybody hears it, and leave."""
    with contextlib.suppress(OSError):
        err.print(f"error: {line}")
    sys.exit(status)


def _nowhere() -> Any:
    """A stream for what nobody reads."""
    return open(os.devnull, "w", encoding="utf-8")


def _called() -> None:
    """The command; memory that ran out is an answer too."""
    try:
        app(prog_name="prunelm")
    except (MemoryError, OSError, RuntimeError) as error:
        from .memory import memory_error
        from .shortage import ran_out

        if not ran_out(error):
            raise
        raise memory_error(error) from error


def _run() -> None:
    """The command, by all processes that `torchrun` started; what they cannot share is left to the first."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        _called()
        return
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ["RANK"] != "0":
        out.quiet = err.quiet = True
        sys.stdout = _nowhere()
    if command not in SHARED:
        if os.environ["RANK"] == "0":
            _called()
        return
    from .distributed import give_reason, together

    with together():
        try:
            _called()
        except PruneLMError as error:
            give_reason(str(error))
            raise


def main() -> None:
    """Run the command line; errors that are answers to the user are one line and exit 1."""
    # These are read when the libraries are imported, which happens inside the commands.
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if "--stream" in sys.argv:
        return_large()  # before the libraries are imported, which is when it helps most
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()
    for number in SIGNALS:
        # A program started by nohup, or in the background, is told to ignore some.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _terminated)
    try:
        try:
            _run()
        finally:
            sys.stdout.flush()
    except PruneLMError as error:
        if "--debug" in sys.argv:
            raise
        _fail(" ".join([str(error), *getattr(error, "__notes__", [])]), 1)
    except _Interrupted as stop:
        name = signal.Signals(stop.args[0]).name
        how = "interrupted" if name == "SIGINT" else f"ended by {name}"
        kept = " ".join(getattr(stop, "__notes__", []))
        _fail(f"{how}; {kept or 'nothing was left half-written'}", 128 + stop.args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        line = f"{error.filename or 'the output cannot be written'}: {error.strerror or error}"
        notes = getattr(error, "__notes__", [])
        _fail(" ".join([f"{line}.", *notes]) if notes else line, 1)
