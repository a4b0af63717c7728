"""A block that passed through memory leaves none of it behind."""

import os
import sys
from pathlib import Path

import pytest
import torch

from prunelm.loading import find_model
from prunelm.shelf import Shelf
from prunelm.testing import tiny_model

MEGABYTE = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is resident")
def test_what_a_block_freed_goes_back_although_something_behind_it_stays(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    shelf = Shelf(find_model(tmp_path, device="cpu"))
    torch.ones(8 * MEGABYTE)  # Once that is freed, glibc keeps pieces of up to its size in its heap.
    before = resident()
    with shelf.opened(0):
        pieces = [torch.ones(MEGABYTE // 4) for _ in range(64)]
        behind = pieces.pop()
        del pieces
    assert resident() - before < 16 * MEGABYTE
    del behind
