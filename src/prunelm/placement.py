"""Where a model computes, and how its numbers are held to be the same twice."""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .distributed import launched
from .errors import DeviceError

CPU = torch.device("cpu")
KINDS = ("cpu", "cuda", "mps")
AUTO = "auto"
"""In place of a device: all GPUs of this machine, each with some of the blocks; where there is one or none, that."""
ROWS = 256
"""Rows of a large matrix worked on at a time, where each needs several more of its kind."""


def find_device(name: str | None = None) -> torch.device:
    """The device that a name means, checked to be there; without a name a GPU of CUDA where there is one, else the CPU.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto`, which means the first of several GPUs (see `spreads`).

    Raises:
        DeviceError: no such device here; says which there are.
    """
    if name in (None, AUTO):
        return _one_of_several(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kind, _, index = name.partition(":")
    if kind not in KINDS or (index and not index.isdigit()):
        raise DeviceError(f"no such device: {name!r}. Say {', '.join(devices_here())}.")
    if kind not in {here.partition(":")[0] for here in devices_here()} or (
        kind == "cuda" and int(index or 0) >= torch.cuda.device_count()
    ):
        raise DeviceError(f"device {name!r} is not here: there is {', '.join(devices_here())}")
    return _one_of_several(torch.device(name))


def spreads(name: str | None) -> bool:
    """Whether a name means several GPUs, with some of a model's blocks on each; never for one of several processes."""
    return name == AUTO and launched() == 1 and torch.cuda.is_available() and torch.cuda.device_count() > 1


def _one_of_several(device: torch.device) -> torch.device:
    """The GPU of this process, where several processes on a machine share its GPUs and none was named."""
    if device.type != "cuda" or device.index is not None or launched() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def devices_here() -> list[str]:
    """The devices of this machine, by name."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def devices_of(model: PreTrainedModel) -> str:
    """The devices of a model in words, as results say them."""
    there = dict.fromkeys(p.device for p in model.parameters() if not p.is_meta)
    return ", ".join(device_words(device) for device in there)


def device_words(device: torch.device) -> str:
    """A device in words, as results say it."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def statistics_device(device: torch.device) -> torch.device:
    """Where sums in float64 are kept for a model on `device`: beside it, but for MPS, which knows no float64."""
    return CPU if device.type == "mps" else device


def placed(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model on a device.

    Raises:
        DeviceError: it does not fit; says how much it needs and how much is free.
    """
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        raise DeviceError(
            f"{device}: the weights need {needed:,} bytes, and {memory_words(device)}. Use --compute-dtype bfloat16, "
            "another --device, or --stream."
        ) from error


def memory_words(device: torch.device) -> str:
    """How much of a device's memory is free, in words."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    elif device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        free, total = (os.sysconf(f"SC_{which}PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") for which in ("AV", ""))
    else:
        return "it says no more of its memory"
    return f"{free:,} of {total:,} bytes are free"


def exact(t: Tensor) -> Tensor:
    """A tensor in float64, where statistics are kept."""
    return t.to(statistics_device(t.device), torch.float64)


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """While open, only algorithms that give the same bits every time run, if `wanted`; slower on GPUs.

    On the CPU the same thread count gives the same bits anyway.
    """
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
