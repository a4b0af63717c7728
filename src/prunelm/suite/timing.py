"""Parts `speed` and `memory`: what the smaller model saves on this machine, measured."""

import functools
import json
import statistics
import subprocess
import sys
from typing import Any

import torch

from ..errors import EvaluationError
from ..journal import Journal
from ..loading import bytes_on_disk
from ..placement import device_words
from ..progress import Progress
from ..speed import cache_bytes, decode_seconds, prefill_seconds
from ..tasks import task_of
from . import Setting, Subject

PREFILL = 512
PROMPT = 64
NEW = 32


def speed(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Medians over rounds in which the models take turns, after a warm-up round.

    Ratios are the median and the quartiles of those of each round.

    `prefill` and `decode` in tokens/s, `first_token` in seconds (a prompt of 64 tokens), `cache` in bytes per token.
    """
    names, causal = list(subject.models), task_of(subject.model) == "causal"
    length = min(PREFILL, getattr(subject.model.config, "max_position_embeddings", None) or PREFILL)
    prompt = max(1, min(PROMPT, length - NEW))
    new = max(2, min(NEW, length - prompt))
    rounds = []
    for turn in range(setting.rounds + 1):
        progress("timing", turn, setting.rounds + 1)
        measured = functools.partial(_round, subject, length, prompt, new, causal)
        if turn:
            rounds.append(journal.entry(measured))
        else:
            measured()
    progress("timing", setting.rounds + 1, setting.rounds + 1)
    found: dict[str, Any] = {
        "prompt": {"prefill": length, "first_token": prompt, "decode": new},
        "rounds": setting.rounds,
        "threads": torch.get_num_threads(),
        "processor": device_words(subject.model.device),
    }
    for name in names:
        found[name] = {measure: statistics.median(r[name][measure] for r in rounds) for measure in rounds[0][name]}
        found[name]["file_bytes"] = bytes_on_disk(subject.sources[name])
        if causal:
            found[name]["cache_bytes_per_token"] = cache_bytes(subject.models[name], prompt) / prompt
    if "dense" in names:
        found["ratio"] = {m: spread([r["model"][m] / r["dense"][m] for r in rounds]) for m in rounds[0]["model"]}
    return found


def spread(ratios: list[float]) -> dict[str, float | None]:
    """The median of some ratios, and their quartiles, which a single one has not."""
    if len(ratios) < 2:
        return {"value": ratios[0], "low": None, "high": None}
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"value": middle, "low": low, "high": high}


def _round(subject: Subject, length: int, prompt: int, new: int, causal: bool) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, model in subject.models.items():
        found[name] = {"prefill": length / prefill_seconds(model, length)}
    if causal:
        for name, model in subject.models.items():
            first, rest = decode_seconds(model, prompt, new)
            found[name] |= {"first_token": first, "decode": (new - 1) / rest}
    return found


def memory(subject: Subject, setting: Setting, journal: Journal, progress: Progress) -> dict[str, Any]:
    """Peak bytes of a fresh process per model: after loading, and after a prompt and some tokens.

    Resident memory on the CPU; on a GPU what PyTorch allocated there.

    Raises:
        EvaluationError: the process failed.
    """
    found: dict[str, Any] = {}
    for i, (name, source) in enumerate(subject.sources.items()):
        progress("measuring memory", i, len(subject.sources))
        place = source.folder / source.gguf if source.gguf else source.folder
        found[name] = journal.entry(
            functools.partial(
                _peak,
                str(place),
                setting.dtype,
                str(source.device),
                trust_remote_code=source.trust_remote_code,
                allow_pickle=source.allow_pickle,
            )
        )
    progress("measuring memory", len(subject.sources), len(subject.sources))
    return found


def _peak(model: str, dtype: str, device: str, **access: bool) -> dict[str, Any]:
    words = [model, dtype, device, *(f"--{name.replace('_', '-')}" for name, allowed in access.items() if allowed)]
    run = subprocess.run([sys.executable, "-m", "prunelm.footprint", *words], capture_output=True, text=True)
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"{model}: memory could not be measured in a fresh process: {last[:300]}")
    return json.loads(run.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]
