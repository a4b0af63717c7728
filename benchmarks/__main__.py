"""`python -m benchmarks run NAME...` measures; `python -m benchmarks table` writes docs/results.md from the JSON.

`python -m benchmarks quality` measures all recipes at five sizes, `python -m benchmarks siblings` OSP, AEF, HyWIA and
LIAR beside their ingredients, `python -m benchmarks robustness` noise and text of other kinds; all write the page.
`--device cuda` behind the last one computes there. `python -m benchmarks fuzz` reads damaged files of every kind,
`python -m benchmarks stream` measures what streaming takes and how cost grows.
"""

import os
import sys
import warnings

from transformers.utils import logging

from . import fuzz, overhead, quality, robustness, siblings, streaming, table, zero_shot

RUNS = {
    "smollm2": quality.smollm2,
    "frontier": quality.frontier,
    "minilm-sst2": quality.encoder,
    "tiny-gpt2": quality.tiny_gpt2,
    "siblings": siblings.main,
    "zero-shot": zero_shot.main,
    "robustness": robustness.main,
    "fuzz": fuzz.main,
    "stream": streaming.main,
    "overhead-time": overhead.times,
    "overhead": overhead.main,
}

SHORT = {"quality": ["run", "frontier"]} | {
    name: ["run", name] for name in ("siblings", "robustness", "fuzz", "stream")
}


def main(words: list[str]) -> int:
    """Exit code of the command line."""
    if words[:1] == ["table"]:
        table.write()
        return 0
    options = {"device": words.pop()} if words[-2:-1] == ["--device"] and words[0] == "robustness" else {}
    words = SHORT.get(" ".join(words).removesuffix(" --device"), words)
    if words[:1] != ["run"] or set(words[1:]) - set(RUNS):
        said = f"run [{' '.join(RUNS)}] | {' | '.join(SHORT)} [--device NAME] | table"
        print(f"usage: python -m benchmarks {said}", file=sys.stderr)
        return 2
    os.environ["TQDM_DISABLE"] = "1"
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    for name in words[1:] or RUNS:
        RUNS[name](**options)
    table.write()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
