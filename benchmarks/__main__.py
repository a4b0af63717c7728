"""`python -m benchmarks run NAME...` measures; `python -m benchmarks table` writes docs/results.md from the JSON.

`python -m benchmarks quality` measures all recipes at five sizes, `python -m benchmarks siblings` OSP, AEF, HyWIA and
LIAR beside their ingredients; both write the page.
"""

import os
import sys
import warnings

from transformers.utils import logging

from . import overhead, quality, siblings, table, zero_shot

RUNS = {
    "smollm2": quality.smollm2,
    "frontier": quality.frontier,
    "minilm-sst2": quality.encoder,
    "tiny-gpt2": quality.tiny_gpt2,
    "siblings": siblings.main,
    "zero-shot": zero_shot.main,
    "overhead-time": overhead.times,
    "overhead": overhead.main,
}


def main(words: list[str]) -> int:
    """Exit code of the command line."""
    if words[:1] == ["table"]:
        table.write()
        return 0
    words = {"quality": ["run", "frontier"], "siblings": ["run", "siblings"]}.get(" ".join(words), words)
    if words[:1] != ["run"] or set(words[1:]) - set(RUNS):
        print(f"usage: python -m benchmarks run [{' '.join(RUNS)}] | quality | table", file=sys.stderr)
        return 2
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in words[1:] or RUNS:
        RUNS[name]()
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
