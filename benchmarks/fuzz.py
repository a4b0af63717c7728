"""Damaged files of every kind that PruneLM reads: each is read or refused, at once, with no more memory than it has.

`python -m benchmarks fuzz` reads 10,000 of each kind. A refusal is a `PruneLMError`; anything else is a crash. Memory
is what Python allocates while a file is read (tracemalloc), and the address space of the process is bounded besides, so
that a size in a header that was believed ends in an error.
"""

import contextlib
import json
import resource
import signal
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prunelm.allocation import Outlook
from prunelm.calibration import FACTS, load_calibration, save_calibration
from prunelm.data import read_documents, read_labeled
from prunelm.errors import PruneLMError
from prunelm.forms import damage_answered
from prunelm.journal import Journal
from prunelm.loading import Source, check_gguf, find_model, load_model, skeleton
from prunelm.matching import planned_units
from prunelm.plan_file import PlanFile, differences
from prunelm.planning import plan
from prunelm.recipe import RECIPES, Recipe, recipe_names
from prunelm.report.content import content
from prunelm.report.gathering import gather
from prunelm.sized_pruning import sized_by
from prunelm.suite.measuring import read_evaluation
from prunelm.survey import Survey
from prunelm.testing import tiny_model
from prunelm.workbench import HEAD, place_of, unfinished, workbench

from .damage import damaged_bytes, damaged_json, other_sizes
from .record import measure

COUNT = 10_000
SECONDS = 5
"""Of computing, after which a file counts as one that hangs."""
FIXED = 1 << 20
"""Bytes that reading may take beside twice the file: the reader's own objects."""
ADDRESSES = 1 << 30
"""Bytes of address space that the process may take beside what it has."""
Read = Callable[[bytes], None]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file: a whole one, damaged ones, and what reads them."""

    whole: bytes
    files: st.SearchStrategy[bytes]
    read: Read


@dataclass(kw_only=True)
class Found:
    """What became of the files of one kind.

    `once`: bytes of readings over the allowance that a second reading of the same file did not need; they are what the
    interpreter keeps (a table that grows, a late import), not what the file asks for.
    """

    files: int = 0
    refused: int = 0
    crashes: list[str] = field(default_factory=list)
    hangs: int = 0
    too_much_memory: list[str] = field(default_factory=list)
    once: list[int] = field(default_factory=list)
    most_bytes_beyond_twice: int = 0
    most_seconds: float = 0.0


def main(count: int = COUNT) -> None:
    """All kinds; each is measured once and kept."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, kind in kinds(Path(scratch)).items():
            measure("fuzz", name, lambda kind=kind: vars(campaign(kind, count)))


def campaign(kind: Kind, count: int) -> Found:
    """What becomes of so many files, the same ones each time; a whole one is read first, and must be read."""
    found = Found()
    kind.read(kind.whole)
    every = reading(kind, found, count)
    with bounded():
        every()
    return found


def reading(kind: Kind, found: Found, count: int) -> Callable[..., None]:
    """A hypothesis test that reads damaged files, and adds to `found` what becomes of them."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(kind.files)
    def every(raw: bytes) -> None:
        attempt(kind.read, raw, found)

    return every


def attempt(read: Read, raw: bytes, found: Found) -> None:
    """Read one file, and add to `found` what became of it."""
    beyond = _beyond(read, raw, found)
    found.files += 1
    if beyond > FIXED:
        first, beyond = beyond, _beyond(read, raw, Found())
        if beyond <= FIXED:
            found.once.append(first)
    found.most_bytes_beyond_twice = max(found.most_bytes_beyond_twice, beyond)
    if beyond > FIXED:
        found.too_much_memory.append(f"{beyond:,} bytes for {raw[:400]!r}")


def _beyond(read: Read, raw: bytes, found: Found) -> int:
    """Bytes beyond twice the file that one reading takes at most, and in `found` how it ends."""
    tracemalloc.start()
    start = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        read(raw)
    except PruneLMError:
        found.refused += 1
    except TimeoutError:
        found.hangs += 1
    except Exception as error:  # a crash is what is looked for
        found.crashes.append(f"{type(error).__name__}: {str(error)[:80]} from {raw[:400]!r}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    found.most_seconds = max(found.most_seconds, time.process_time() - start)
    return peak - 2 * len(raw)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more address space, and an alarm for files that hang."""

    def late(_signum: int, _frame: Any) -> None:
        raise TimeoutError

    status = Path("/proc/self/status")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, late)
    if status.exists():
        now = next(line for line in status.read_text().splitlines() if line.startswith("VmSize"))
        resource.setrlimit(resource.RLIMIT_AS, (int(now.split()[1]) * 1024 + ADDRESSES, limits[1]))
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def kinds(scratch: Path) -> dict[str, Kind]:
    """Every kind of file, with whole ones made in a folder of one's own."""
    return {
        **_weights(scratch),
        **_of_a_pruned_model(scratch),
        **_calibration(scratch),
        **_text(scratch),
        "plan.json": _plan(scratch),
        "recipe.toml": _recipe(scratch),
        "journal": _journal(scratch),
        "task.json": _task(scratch),
    }


def _json(whole: dict[str, Any], read: Read) -> Kind:
    return Kind(whole=json.dumps(whole).encode(), files=damaged_json(whole), read=read)


def _bytes(whole: bytes, read: Read) -> Kind:
    return Kind(whole=whole, files=damaged_bytes(whole), read=read)


def _model(folder: Path) -> Path:
    if not folder.exists():
        tiny_model("llama", vocab_size=64, max_position_embeddings=32).save_pretrained(folder)
    return folder


def _in(path: Path, then: Callable[[], Any]) -> Read:
    """What writes bytes to a path and reads them from there."""

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        then()

    return read


def _weights(scratch: Path) -> dict[str, Kind]:
    """Index and header of safetensors, config.json, header of GGUF."""
    folder, outside = _model(scratch / "indexed"), scratch / "outside"
    outside.mkdir()
    (folder / "link").symlink_to(outside)
    save_file({"secret": torch.zeros(2)}, outside / "secret.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"

    def inside() -> None:
        find_model(folder)
        for name in json.loads(index.read_bytes())["weight_map"].values():
            assert (folder / name).parent.resolve() == folder.resolve(), f"{name} lies outside"

    sample = {"metadata": {"total_size": 9}, "weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
    single, shaped, loaded = (_model(scratch / name) for name in ("single", "shaped", "loaded"))
    header = single / "model.safetensors"
    save_file({"x": torch.ones(3, 5), "y": torch.ones(7, dtype=torch.bfloat16)}, header, metadata={"format": "pt"})
    gguf = scratch / "model.gguf"
    writer = GGUFWriter(gguf, "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = json.loads((shaped / "config.json").read_text())
    return {
        "safetensors index": _json(sample, _in(index, inside)),
        "safetensors header": _bytes(header.read_bytes(), _in(header, lambda: find_model(single))),
        "GGUF header": _bytes(gguf.read_bytes(), _in(gguf, lambda: check_gguf(gguf))),
        "config.json": _json(config, _in(shaped / "config.json", lambda: find_model(shaped).config())),
        "config.json, loaded": Kind(
            whole=json.dumps(config).encode(),
            files=st.one_of(damaged_json(config), other_sizes(config)),
            read=_in(loaded / "config.json", lambda: load_model(find_model(loaded))),
        ),
    }


def _of_a_pruned_model(scratch: Path) -> dict[str, Kind]:
    """pruning.json as it is loaded, repaired from and reported; evaluation.json as it goes on and is shown."""
    folder = _model(scratch / "pruned")
    dense = skeleton(find_model(folder))
    source = Source(name=str(folder), folder=folder)
    sites = {f"{block}.ffn": {"units": 44, "kept": list(range(20))} for block in range(3)}
    facts = {"tokens": 9, "sequences": 1, "source": "a.txt", "ngrams": {"words": 8, "modulus": 1, "hashes": "AAAAAAE="}}
    pruning = {
        "format": 1,
        "loader": "prunelm",
        "base_model": "tiny",
        "recipe": Recipe().to_dict(),
        "parameters": {"before": 99, "after": 80, "prunable": 50, "share_of_blocks": 0.2, "share_of_model": 0.1},
        "sites": sites,
        "widths": {f"{block}.ffn": {"units": 20} for block in range(3)},
        "calibration": {"criterion": facts, "refit": {"tokens": 9}},
        "notes": ["a note"],
        "versions": {"prunelm": "0.1.0"},
    }
    (folder / "pruning.json").write_text(json.dumps(pruning))

    def plan() -> None:
        found = source.plan()
        planned_units(found, dense)

    def report() -> None:
        with damage_answered(folder):
            content(gather(folder))

    evaluation = {
        "format": 1,
        "model": {"name": "a", "weights": "b", "parameters": 80, "bytes": 400},
        "against": {"name": "a", "weights": "c", "parameters": 99, "bytes": 500},
        "parts": {
            "quality": {
                "settings": {"length": 8},
                "text": {"name": "t", "sha256": "0"},
                "results": {"metric": "perplexity", "value": 9.0, "error": 0.1, "bits_per_byte": 1.0},
                "overlap": {"share": 0.0, "checked": 3, "shared": 0, "flagged": False},
            }
        },
        "versions": {},
    }
    path = scratch / "evaluation.json"
    return {
        "pruning.json": _json(pruning, _in(folder / "pruning.json", plan)),
        "pruning.json, reported": _json(pruning, _in(folder / "pruning.json", report)),
        "evaluation.json": _json(evaluation, _in(path, lambda: read_evaluation(path))),
    }


def _calibration(scratch: Path) -> dict[str, Kind]:
    model, folder = _model(scratch / "dense"), scratch / "calibrated"
    source, recipe = find_model(model), Recipe()
    survey = Survey(
        scores={"0.ffn": torch.zeros(4)},
        curves={"0.ffn": torch.zeros(5)},
        prices={"0.ffn": [(1, 0.5)]},
        curvatures={"0.ffn": 1.0},
    )
    outlook = Outlook(survey=survey, prices={"0.ffn": 1.0}, notes=["a note"])
    save_calibration(outlook, folder, source=source, recipe=recipe, text={"tokens": 9})
    sample = json.loads((folder / FACTS).read_text())
    read = _in(folder / FACTS, lambda: load_calibration(folder, source=source, recipe=recipe))
    return {"calibration.json": _json(sample, read)}


def _plan(scratch: Path) -> Kind:
    """A plan that people edit, as `prune --plan` applies it and `plan --diff` shows it."""
    folder, whole, path = _model(scratch / "planned"), scratch / "whole.json", scratch / "plan.json"
    plan(folder, whole, sparsity=0.2)
    source = find_model(folder)
    first = PlanFile(whole)

    def read() -> None:
        sized_by(path, None, source, Recipe())
        differences(first, PlanFile(path))

    return _json(json.loads(whole.read_text()), _in(path, read))


def _text(scratch: Path) -> dict[str, Kind]:
    plain, lines = scratch / "text.txt", scratch / "text.jsonl"
    words = ("Some words, façade, \U0001f642.\r\n" * 3).encode()
    rows = b'{"text": "one", "label": 1}\n{"sentence": "two", "label": 0}\n\n{"text": "three", "label": 2}'
    return {
        ".txt": _bytes(words, _in(plain, lambda: read_documents(plain))),
        ".jsonl": _bytes(rows, _in(lines, lambda: (read_documents(lines), read_labeled(lines)))),
    }


def _task(scratch: Path) -> Kind:
    out = scratch / "out"
    path = place_of(out) / HEAD
    task = {"model": "dense", "text": None, "sparsities": [0.2], "recipe": Recipe().to_dict()}
    with workbench(out, task, command="prune"):
        whole = json.loads(path.read_text())
    path.parent.mkdir()
    return _json(whole, _in(path, lambda: unfinished(out)))


def _recipe(scratch: Path) -> Kind:
    path = scratch / "recipe.toml"
    samples = [(RECIPES / f"{name}.toml").read_bytes() for name in recipe_names()]
    deep = st.integers(1, 3000).map(lambda n: b"sparsity = " + b"[" * n)
    edited = st.one_of(*(damaged_bytes(sample) for sample in samples))
    files = st.one_of(edited, edited, _toml(), deep)
    return Kind(whole=samples[0], files=files, read=_in(path, lambda: Recipe.load(path)))


def _toml() -> st.SearchStrategy[bytes]:
    """Recipes with known keys and values of any kind."""
    keys = st.sampled_from(sorted(Recipe().to_dict()))
    values = st.one_of(
        st.sampled_from(
            ("inf", "nan", "-1", "true", '"x"', "[]", "{}", "[[1]]", "{criterion = 1}", "1e400", "9" * 400)
        ),
        st.integers().map(str),
        st.floats(allow_nan=False, allow_infinity=False).map(repr),
        st.text(max_size=6).map(json.dumps),
    )
    lines = st.dictionaries(keys, values, max_size=5)
    return lines.map(lambda found: "\n".join(f"{key} = {value}" for key, value in found.items()).encode())


def _journal(scratch: Path) -> Kind:
    path = scratch / "search.jsonl"
    journal = Journal(path, {"seed": 1})
    for n in range(4):
        journal.entry(lambda n=n: {"divergence": n / 7, "removed": {"0.ffn": n}})
    return _bytes(path.read_bytes(), _in(path, lambda: Journal(path, {"seed": 1})))
