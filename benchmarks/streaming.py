"""What `prune --stream` takes of memory and time beside the whole model in memory, and how cost grows.

Llamas with random weights, built in a temporary folder; the text is Python's language reference, read byte by byte.
`PRUNELM_STREAM_BLOCKS=14 python -m benchmarks stream` is the same on a model a quarter of the size.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from prunelm import pruning
from prunelm.consumer_repair import ConsumerRepair
from prunelm.data import Batches, sequences_at_once
from prunelm.demo import language_reference
from prunelm.pruning import prune_
from prunelm.recipe import Recipe

from .overhead import peak_memory
from .record import measure

BLOCKS = int(os.environ.get("PRUNELM_STREAM_BLOCKS", "56"))
SHAPE = {"hidden_size": 1024, "intermediate_size": 1536, "num_attention_heads": 16, "num_key_value_heads": 16}
RECIPES = ("wanda-sp", "obs", "goa-budget")
SAMPLES, LENGTH, SPARSITY = 4, 512, 0.3
GROWTH = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 4}
GROWTH_BLOCKS, GROWTH_TOKENS, ROUNDS = 8, 16_384, 3
USUAL_TOKENS = 65_536
"""What recipes calibrate on."""


def main() -> None:
    """All cells; each is measured once and kept."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for recipe in RECIPES:
            measure("streaming", f"{recipe}, {BLOCKS} blocks", lambda recipe=recipe: beside(folder, recipe))
    for name, size in (
        ("blocks", {"blocks": GROWTH_BLOCKS}),
        ("tokens", {"tokens": GROWTH_TOKENS}),
        ("usual tokens", {"tokens": USUAL_TOKENS}),
        ("FFN width", {"width": GROWTH["intermediate_size"]}),
    ):
        measure("streaming", f"twice the {name}", lambda size=size: growth(size))


def beside(folder: Path, recipe: str) -> dict[str, Any]:
    """Two prunes of one checkpoint, each in a process of its own: with the whole model in memory, and streamed."""
    model, text = folder / "dense", folder / "text.txt"
    if not model.exists():
        _run("build", str(model))
        # A byte is a token: more text than needed, but not so much that tokenizing it takes more than the model.
        text.write_text("\n\n".join(language_reference())[: 16 * SAMPLES * LENGTH], encoding="utf-8")
    found: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in model.glob("*.safetensors"))}
    found |= {"blocks": BLOCKS, "tokens": SAMPLES * LENGTH, "libraries": _run("libraries")["peak"]}
    command = ["prune", str(model), "--sparsity", str(SPARSITY), "--recipe", recipe, "--text", str(text)]
    command += ["--samples", str(SAMPLES), "--length", str(LENGTH), "--device", "cpu"]
    for name, options in (("in memory", []), ("streamed", ["--stream"])):
        out = folder / name.replace(" ", "-")
        start = time.perf_counter()
        measured = _run(*command[:2], str(out), *command[2:], *options)
        found[name] = {"seconds": time.perf_counter() - start, **measured}
    found["proof of the streamed"] = _run("prove", str(folder / "streamed"))["peak"]
    found["same weights"] = _same(folder / "in-memory", folder / "streamed")
    for name in ("in-memory", "streamed"):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    found["memory"] = max(found["streamed"]["peak"], found["proof of the streamed"]) / found["bytes"]
    for ratio, kind in (("time", "seconds"), ("processor time", "processor")):
        found[ratio] = found["streamed"][kind] / found["in memory"][kind]
    return found


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same weights, bit for bit; one tensor of each is in memory at a time."""
    from prunelm.loading import unmapped

    mine, theirs = unmapped(one), unmapped(other)
    if mine is None or theirs is None or mine.keys() != theirs.keys():
        return False
    return all(torch.equal(mine[name][:], theirs[name][:]) for name in mine)


def growth(size: dict[str, int]) -> dict[str, Any]:
    """Processor seconds of a prune with repair at a size and at twice that in one respect, in turns.

    `solve` is scoring, repair and what they report, which read no token; `passes` is all the rest. A first run, which
    warms up, does not count.
    """
    sizes = {"once": size, "twice": {name: 2 * value for name, value in size.items()}}
    _timed(blocks=1)
    rounds = [{name: _timed(**one) for name, one in sizes.items()} for _ in range(ROUNDS)]
    found: dict[str, Any] = {
        name: {part: statistics.median(r[name][part] for r in rounds) for part in ("total", "solve", "passes")}
        for name in sizes
    }
    ratios = {
        part: statistics.median(r["twice"][part] / r["once"][part] for r in rounds)
        for part in ("total", "solve", "passes")
    }
    return {**found, "ratio": ratios, "rounds": ROUNDS, "threads": 1}


def _timed(
    blocks: int = GROWTH_BLOCKS, tokens: int = GROWTH_TOKENS, width: int = GROWTH["intermediate_size"]
) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(**{**GROWTH, "intermediate_size": width}, num_hidden_layers=blocks, vocab_size=512)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(512, (tokens // LENGTH, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = Batches(
        batches=[{"input_ids": b} for b in ids.split(sequences_at_once(LENGTH))],
        facts={"tokens": ids.numel(), "sequences": len(ids)},
    )
    try:
        with _solving() as solved:
            start = time.process_time()
            prune_(model, batches, Recipe.load("obs", sparsity=SPARSITY, held_out=0.0))
            total = time.process_time() - start
    finally:
        torch.set_num_threads(threads)
    return {"total": total, "solve": sum(solved), "passes": total - sum(solved)}


@contextlib.contextmanager
def _solving() -> Iterator[list[float]]:
    """While open, processor seconds of every scoring and every repair are noted."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            found = function(*args, **kwargs)
            spent.append(time.process_time() - start)
            return found

        return run

    places: tuple[tuple[Any, str], ...] = (
        (pruning, "score"),
        (pruning, "removed_energy"),
        (ConsumerRepair, "__call__"),
    )
    before = [getattr(module, name) for module, name in places]
    for (module, name), own in zip(places, before, strict=True):
        setattr(module, name, timed(own))
    try:
        yield spent
    finally:
        for (module, name), own in zip(places, before, strict=True):
            setattr(module, name, own)


def _run(*words: str) -> dict[str, Any]:
    """What a process of its own says about itself."""
    command = [sys.executable, "-m", "benchmarks.streaming", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _build(folder: Path) -> None:
    """A model with random weights and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS, vocab_size=512, max_position_embeddings=LENGTH)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="200MB")
    save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path, merges: Sequence[tuple[str, str]] = ()) -> None:
    """A tokenizer of bytes, which reads any text, and of the pairs that are named; a format may ask for one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<bos>", "<eos>", "<unk>", *alphabet, *map("".join, merges)]
    vocabulary = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    tokenizer.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def _child(words: list[str]) -> None:
    """Do what a process of its own was asked for, and say what it took: the peak of its memory, processor seconds."""
    if words[0] == "build":
        _build(Path(words[1]))
    elif words[0] == "prove":
        from prunelm.verify import PROOF_TOKENS, proof_inputs, streamed_logits

        streamed_logits(Path(words[1]), proof_inputs(512, PROOF_TOKENS))
    elif words[0] == "libraries":
        import prunelm.workflow.one_size  # noqa: F401
    else:
        from prunelm.cli import main as command

        sys.argv = ["prunelm", *words]
        try:
            command()
        except SystemExit as stop:
            if stop.code:
                raise
    spent = [getrusage(who) for who in (RUSAGE_SELF, RUSAGE_CHILDREN)]
    print(json.dumps({"peak": peak_memory(), "processor": sum(s.ru_utime + s.ru_stime for s in spent)}))


if __name__ == "__main__":
    _child(sys.argv[1:])
