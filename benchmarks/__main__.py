"""`python -m benchmarks run NAME...` measures; `python -m benchmarks table` writes docs/results.md from the JSON.

`python -m benchmarks quality` measures all recipes at five sizes, the sweep of two from 10 to 90 % and zero-shot tasks,
`trials` what was tried for `best`, `siblings` OSP, AEF, HyWIA and LIAR beside their ingredients, `robustness` noise and
text of other kinds, `fuzz` and `guided` damaged files of every kind, `stream` what streaming takes and how cost grows,
`processes` two processes against one, `faults` kills at any moment and other faults; all write the page.
`--device cuda` computes there, and `--workers 6` lets six processes share the cells, which a GPU is wide enough for.
Timings need one worker and a quiet machine.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings

from transformers.utils import logging

from . import (
    budgets,
    families,
    faults,
    fuzz,
    guided,
    large,
    overhead,
    processes,
    quality,
    record,
    robustness,
    siblings,
    streaming,
    table,
    trials,
    zero_shot,
)

RUNS = {
    "smollm2": quality.smollm2,
    "frontier": quality.frontier,
    "sweep": quality.sweep,
    "families": families.main,
    "minilm-sst2": quality.encoder,
    "tiny-gpt2": quality.tiny_gpt2,
    "trials": trials.main,
    "siblings": siblings.main,
    "budgets": budgets.main,
    "zero-shot": zero_shot.main,
    "robustness": robustness.main,
    "fuzz": fuzz.main,
    "guided": guided.main,
    "processes": processes.main,
    "faults": faults.main,
    "stream": streaming.main,
    "large": large.main,
    "overhead-time": overhead.times,
    "overhead": overhead.main,
}

SHORT = {"quality": ["frontier", "sweep", "families", "zero-shot"]} | {
    name: [name]
    for name in ("trials", "siblings", "robustness", "fuzz", "guided", "stream", "budgets", "processes", "faults")
}


def main(words: list[str]) -> int:
    """Exit code of the command line."""
    asked = _parser().parse_args(words)
    if asked.what == "table":
        table.write()
        return 0
    names = asked.names if asked.what == "run" else SHORT[asked.what]
    if asked.device is not None:
        os.environ[record.DEVICE] = asked.device
    if asked.workers > 1:
        _together(asked.workers, names or list(RUNS))
    else:
        _alone(names or list(RUNS))
    if record.shared_folder() is None:
        table.write()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", choices=["run", *SHORT, "table"])
    parser.add_argument("names", nargs="*", choices=[*RUNS, []], default=[], help="for run: which; all by default")
    parser.add_argument("--device", help="where models compute: cpu, cuda")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the cells")
    return parser


def _alone(names: list[str]) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in names:
        RUNS[name]()


def _together(workers: int, names: list[str]) -> None:
    """Several processes of this program that share a folder, in which they claim cells."""
    command = [sys.executable, "-m", "benchmarks", "run", *names]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, record.TOGETHER: folder}
        started = [subprocess.Popen(command, env=environment) for _ in range(workers)]
        failed = sum(process.wait() != 0 for process in started)
    if failed:
        print(f"{failed} of {workers} processes failed; run it again for the cells that are missing", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
