"""One run on several processes: each carries its share of the batches, and all know the same sums and decisions.

Every process does the same work in the same order, but for the calibration batches, which are dealt out in turns. What
is summed over them is added up over the processes; linear systems are solved for some rows each; decisions are those of
the first process, which alone writes. On one process all of this is nothing.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from .errors import DeviceError, ProcessError, PruneLMError
from .shortage import ran_out

T = TypeVar("T")
PATIENCE = "PRUNELM_PROCESS_TIMEOUT"
"""Environment variable: seconds after which a process that does not answer is lost."""
SECONDS = 600.0
_REASON = "prunelm/reason"
_STORES: list[Any] = []


def launched() -> int:
    """How many processes `torchrun` started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_writer() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """While open, the processes that `torchrun` started work together: over gloo, and NCCL between GPUs.

    Raises:
        DeviceError: the environment is not as `torchrun` makes it.
        ProcessError: another process does not come, or is lost; says why, where that is known.
    """
    seconds = timedelta(seconds=_patience())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # Else NCCL's watchdog ends the process, without a word of ours, where another does not answer in time.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    with _answered():
        try:
            store, number, count = next(iter(rendezvous("env://", timeout=seconds)))
        except ValueError as error:
            raise DeviceError(f"several processes were asked for, but not by torchrun: {error}") from error
        _STORES.append(store)
        dist.init_process_group(
            backend, store=PrefixStore("prunelm", store), rank=number, world_size=count, timeout=seconds
        )
    try:
        yield
    finally:
        _STORES.clear()
        dist.destroy_process_group()


def _patience() -> float:
    """Seconds after which a process that does not answer is lost."""
    said = os.environ.get(PATIENCE, str(SECONDS))
    with contextlib.suppress(ValueError):
        if 0 < float(said) < float("inf"):
            return float(said)
    raise DeviceError(f"{PATIENCE} must be a number of seconds above 0, got {said!r}")


def shared_by() -> list[str]:
    """What results say of several processes, whose sums may differ from those of one in the last digits."""
    return [f"{size()} processes shared the calibration batches"] if size() > 1 else []


def give_reason(line: str) -> None:
    """Leave word for the other processes why this one ends."""
    with contextlib.suppress(RuntimeError):
        for store in _STORES:
            store.set(_REASON, f"process {rank()}: {line}")


def in_turns(items: Sequence[T]) -> Sequence[T]:
    """Those of some items that are dealt to this process."""
    return items[rank() :: size()]


def summed(t: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place."""
    if size() > 1:
        with _answered():
            dist.all_reduce(t)
    return t


def summed_number(number: int | float) -> float:
    """The sum of a number over the processes."""
    return float(summed(torch.tensor(number, dtype=torch.float64, device="cpu"))) if size() > 1 else float(number)


def agreed(t: Tensor, source: int = 0) -> Tensor:
    """A tensor as one process has it, in place; of the same shape everywhere."""
    if size() > 1:
        with _answered():
            dist.broadcast(t, source)
    return t


def agreed_number(number: float) -> float:
    """A number as the first process has it."""
    return float(agreed(torch.tensor(number, dtype=torch.float64, device="cpu"))) if size() > 1 else float(number)


def agreed_bytes(raw: bytes | None) -> bytes | None:
    """Bytes, or None, as the first process has them."""
    if size() == 1:
        return raw
    length = int(agreed(torch.tensor(-1 if raw is None else len(raw), device="cpu")))
    if length <= 0:
        return None if length < 0 else b""
    content = bytearray(raw) if is_writer() and raw is not None else bytearray(length)
    return agreed(torch.frombuffer(content, dtype=torch.uint8)).numpy().tobytes()


def agreed_data(data: T) -> T:
    """Plain data as the first process has them."""
    if size() == 1:
        return data
    raw = agreed_bytes(json.dumps(data).encode())
    assert raw is not None
    found: T = json.loads(raw)
    return found


def shared_rows(make: Callable[[slice], Tensor], like: Tensor, most: int | None = None) -> Tensor:
    """A matrix of which each process makes some rows, all at the same time, before any waits for those of another.

    Args:
        make: gives some of its rows.
        like: has its shape and dtype.
        most: rows that are made at a time.
    """
    runs = _runs(len(like), most)
    mine = {n: make(runs[n]) for n in in_turns(range(len(runs)))}
    if size() == 1:
        return torch.cat(list(mine.values())) if len(mine) > 1 else mine[0]
    whole = torch.empty_like(like, memory_format=torch.contiguous_format)
    for n, rows in enumerate(runs):
        if n in mine:
            whole[rows] = mine[n]
        agreed(whole[rows], n % size())
    return whole


def my_rows(count: int, most: int | None = None) -> Sequence[slice]:
    """Those of some rows that this process sums over, at most so many at a time; the sums are added up later."""
    return in_turns(_runs(count, most))


def _runs(count: int, most: int | None) -> list[slice]:
    """Some rows in runs, about as long for every process."""
    length = max(1, most or count)
    if size() > 1:
        runs = -(-count // length)
        length = -(-count // (runs + -runs % size()))
    return [slice(start, min(start + length, count)) for start in range(0, count, length)]


def dealt_counts(counts: Sequence[int], total: int) -> list[int]:
    """How much of the first `total` falls to each of this process's batches, all batches being taken in turns."""
    if size() == 1:
        everywhere = [list(counts)]
    else:
        most = int(max(gathered(len(counts))))
        mine = torch.tensor([*counts, *[0] * (most - len(counts))], dtype=torch.int64, device="cpu")
        table = torch.zeros(size(), most, dtype=torch.int64, device="cpu")
        table[rank()] = mine
        everywhere = summed(table).tolist()
    found, left = [], total
    for n in range(max(map(len, everywhere))):
        for r, row in enumerate(everywhere):
            taken = min(left, row[n]) if n < len(row) else 0
            left -= taken
            if r == rank() and n < len(counts):
                found.append(taken)
    return found


def gathered(number: int) -> list[int]:
    """A number of each process."""
    table = torch.zeros(size(), dtype=torch.int64, device="cpu")
    table[rank()] = number
    return [int(n) for n in summed(table)]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    summed_number(0)


@contextlib.contextmanager
def _answered() -> Iterator[None]:
    """What the network says of a lost process becomes one line; memory that ran out here is no lost process."""
    try:
        yield
    except PruneLMError:
        raise
    except RuntimeError as error:
        if ran_out(error):
            raise
        told = ""
        with contextlib.suppress(RuntimeError):
            for store in _STORES:
                if store.check([_REASON]):
                    told = store.get(_REASON).decode()
        late = "timed out" in str(error).lower()
        why = told or ("it did not answer in time" if late else "its connection broke")
        raise ProcessError(f"another process of this run was lost ({why}). Start the run again.") from error
