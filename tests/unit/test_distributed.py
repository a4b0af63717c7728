"""Several processes give what one gives: the same units, and weights that differ in the last digits at most."""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import distributed as dist

import prunelm
from prunelm.data import Batches
from prunelm.distributed import (
    agreed_bytes,
    agreed_data,
    dealt_counts,
    gathered,
    in_turns,
    my_rows,
    rank,
    shared_rows,
    summed,
    summed_number,
    together,
)
from prunelm.errors import ProcessError
from prunelm.journal import Journal
from prunelm.moments import Moments
from prunelm.observation import observe
from prunelm.pruning import prune_
from prunelm.recipe import RECIPES as RECIPES_FOLDER
from prunelm.recipe import Recipe
from prunelm.sites import find_sites
from prunelm.stream import BlockStream
from prunelm.testing import tiny_inputs, tiny_model

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
TOLERANCE = 1e-6


def test_moments_are_added_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets have another order in each process: one's held-out tokens would be added to another's fitted ones."""
    model = tiny_model("llama")
    stream = BlockStream(model, [tiny_inputs(model, seed=seed) for seed in range(6)])
    sites = [site for site in find_sites(model) if site.block == 0]
    needs = {site.name: frozenset({"producer", "held", "gram"}) for site in sites}
    shared: list[int] = []
    monkeypatch.setattr(Moments, "share", lambda self: shared.append(self.tokens // 24))
    observe(stream, 0, sites, needs, {"producer": [4, 5], "held": [3], "consumer": [0, 1, 2]}, advance=False)
    assert shared == [3, 1, 2] * len(sites)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def processes(count: int, run: Callable[[], None], seconds: float = 60) -> list[int]:
    """Run a function in so many forked processes that work together; their exit codes."""
    port, children = free_port(), []
    for number in range(count):
        child = os.fork()
        if child == 0:
            facts = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in facts.items()}}
            code = 1
            try:
                with together():
                    run()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    end, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < count and time.monotonic() < end:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for child in children:
        if child not in codes:
            os.kill(child, 9)
            os.waitpid(child, 0)
    assert len(codes) == count, "some process hung"
    return [codes[child] for child in children]


def calibration(sequences: int = 22) -> Batches:
    ids = torch.randint(5, 120, (sequences, 24), generator=torch.Generator().manual_seed(3))
    batches = [{"input_ids": part} for part in ids.split(3)]
    return Batches(batches=batches, facts={"tokens": ids.numel(), "sequences": sequences})


def pruned(recipe: Recipe, folder: Path) -> None:
    """Prune a tiny model, and keep its weights and units in a file of this process."""
    model = tiny_model("llama", vocab_size=128, max_position_embeddings=64)
    report = prune_(model, calibration(), recipe)
    kept = {f"kept/{key}": value for key, value in report.plan.kept.items()}
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file({**weights, **kept}, folder / f"{rank()}.safetensors")


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "two-step refit": ("goa-budget", {"multiple_of": 1}),
    "head similarity": ("goa", {"multiple_of": 1, "similarity_sequences": 7}),
    "search": ("best", {"multiple_of": 1, "rounds": 2}),
    "natural gradient": ("obs", {"multiple_of": 1, "natural_steps": 3}),
    "one shot": ("flap", {"multiple_of": 1}),
    "policy": ("osp", {"multiple_of": 1}),
    "hidden": ("liar", {"multiple_of": 2}),
    "fused": ("hywia", {"multiple_of": 1}),
}


EVERY_DAY = {"two-step refit": (2, 3), "search": (2,), "natural gradient": (2,)}


@pytest.mark.parametrize(("name", "counts"), EVERY_DAY.items())
def test_several_processes_give_what_one_gives(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    compare(name, counts, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_kind_of_recipe_on_two_and_three_processes(name: str, tmp_path: Path) -> None:
    compare(name, (2, 3), tmp_path)


def compare(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """One process against several: equal units, and weights within the tolerance."""
    base, changes = RECIPES[name]
    recipe = Recipe.load(base, sparsity=0.3, **changes)
    (tmp_path / "1").mkdir()
    pruned(recipe, tmp_path / "1")
    single = load_file(tmp_path / "1" / "0.safetensors")
    for count in counts:
        folder = tmp_path / str(count)
        folder.mkdir()
        assert processes(count, lambda folder=folder: pruned(recipe, folder)) == [0] * count
        for number in range(count):
            found = load_file(folder / f"{number}.safetensors")
            assert set(found) == set(single)
            for key, value in single.items():
                if key.startswith("kept/"):
                    assert torch.equal(found[key], value), f"{key} on process {number} of {count}"
                else:
                    gap = float((found[key] - value).norm() / value.norm().clamp_min(1e-12))
                    assert gap <= TOLERANCE, f"{key} differs by {gap:.1e} on process {number} of {count}"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def kept_in(folder: Path) -> dict[str, list[int]]:
    return {k: site["kept"] for k, site in json.loads((folder / "pruning.json").read_text())["sites"].items()}


STREAMED: dict[str, tuple[str, ...]] = {
    "repair": ("obs",),
    "two-step refit": ("goa-budget",),
    "a look at the dense model": ("flap",),
    "Fisher matrices": ("best", "rounds = 12", "natural_steps = 4"),
}


def compare_streamed(
    name: str, count: int, model: Path, text: Path, tmp_path: Path, scratch: Path | None = None
) -> None:
    """A streamed prune on one process against several, and what lies beside the folders then."""
    base, *without = STREAMED[name]
    recipe: str | Path = base
    if without:
        recipe, text_of = tmp_path.parent / f"{tmp_path.name}.toml", (RECIPES_FOLDER / f"{base}.toml").read_text()
        recipe.write_text("\n".join(line for line in text_of.splitlines() if line not in without))
    sizes = {"samples": 24, "length": 32, "sparsity": 0.3, "multiple_of": 1}

    def run(out: str) -> None:
        prunelm.prune(model, tmp_path / out, recipe=recipe, text=text, stream=True, scratch=scratch, **sizes)

    run("one")
    assert processes(count, lambda: run("several"), seconds=120) == [0] * count
    one, several = tmp_path / "one", tmp_path / "several"
    assert kept_in(several) == kept_in(one)
    single, found = weights_of(one), weights_of(several)
    assert found.keys() == single.keys()
    for key, value in single.items():
        gap = float((found[key] - value).norm() / value.norm().clamp_min(1e-12))
        assert gap <= TOLERANCE, f"{key} differs by {gap:.1e} with {count} processes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several"]


def test_streamed_processes_give_what_one_gives(
    tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    compare_streamed("repair", 2, tiny_folder("llama"), text_file, tmp_path, scratch)
    assert list(scratch.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMED)
def test_every_kind_of_streamed_recipe_on_three_processes(
    name: str, tiny_folder: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    compare_streamed(name, 3, tiny_folder("llama"), text_file, tmp_path)


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    def run() -> None:
        found = {
            "turns": list(in_turns(range(7))),
            "sum": summed_number(rank() + 0.5),
            "bytes": [agreed_bytes(raw) == raw for raw in (None, b"", b"abc")],
            "data": agreed_data({"rank": rank(), "text": "é"}),
            "rows": shared_rows(lambda rows: torch.arange(7.0)[rows, None] + rank() / 2, torch.zeros(7, 1), 3).tolist(),
            "summed rows": summed(torch.tensor(sum(sum(range(7)[rows]) for rows in my_rows(7)))).tolist(),
            "gathered": gathered(rank() * 10),
            "dealt": dealt_counts([3, 3, 1 - rank()], 10),
        }
        journal = Journal(tmp_path / "journal.jsonl")
        found["journal"] = [journal.entry(lambda n=n: {"n": n, "rank": rank()}) for n in range(3)]
        (tmp_path / f"{rank()}.json").write_text(json.dumps(found))

    for _ in range(2):
        assert processes(2, run) == [0, 0]
        first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2))
        assert (first.pop("turns"), second.pop("turns")) == ([0, 2, 4, 6], [1, 3, 5])
        assert (first.pop("dealt"), second.pop("dealt")) == ([3, 3, 0], [3, 1, 0])
        assert first == second
        assert first["sum"] == 2.0
        assert first["bytes"] == [True] * 3
        assert first["data"] == {"rank": 0, "text": "é"}
        assert first["rows"] == [[0.0], [1.0], [2.5], [3.5], [4.0], [5.0], [6.5]]
        assert first["summed rows"] == 21
        assert first["gathered"] == [0, 10]
        assert first["journal"] == [{"n": n, "rank": 0} for n in range(3)]


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_lost_process_is_noticed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELM_PROCESS_TIMEOUT", "2" if how == "stopped" else "60")

    def run() -> None:
        summed_number(1.0)
        if rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), 9)
            time.sleep(6)
            return
        with pytest.raises(ProcessError, match=r"another process of this run was lost \(.*\)\. Start the run again"):
            summed_number(1.0)
        (tmp_path / "noticed").touch()

    codes = processes(2, run, seconds=20)
    assert (tmp_path / "noticed").exists()
    assert codes[0] == 0
    assert codes[1] == -9 if how == "killed" else codes[1] is not None


@pytest.mark.parametrize("own", [None, "0"])
def test_nccl_answers_in_time_unless_the_user_says_otherwise(own: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name, seen = "TORCH_NCCL_BLOCKING_WAIT", []
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr("prunelm.distributed.rendezvous", lambda *_, **__: iter([(object(), 0, 1)]))
    monkeypatch.setattr("prunelm.distributed.PrefixStore", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: seen.append(os.environ.get(name)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with together():
        assert seen == [own or "1"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("NCCL error: Cuda failure 'out of memory'"), "^NCCL error"),
        (torch.OutOfMemoryError("CUDA out of memory"), "^CUDA out of memory"),
        (RuntimeError("Connection closed by peer"), "another process of this run was lost"),
        (RuntimeError("Watchdog caught collective operation timeout: it timed out"), "did not answer in time"),
    ],
)
def test_memory_that_ran_out_is_no_lost_process(error: Exception, raised: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("prunelm.distributed.size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", fails)
    with pytest.raises(RuntimeError, match=raised):
        summed(torch.zeros(1))
