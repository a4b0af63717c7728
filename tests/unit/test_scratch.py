"""Hidden states on disk: the same tensors back, slots used again, copies that share until one is written to."""

import pytest
import torch

from prunelm.errors import CheckpointError, OutputError
from prunelm.scratch import FILE, SPARE, Scratch, check_room


def test_states_come_back_and_copies_part_when_written_to(tmp_path):
    scratch = Scratch(tmp_path, slots=2 * 2 + SPARE, slot_bytes=4 * 12)
    states, tensors = scratch.states(), [torch.randn(2, 6), torch.randn(1, 5)]
    for tensor in tensors:
        states.append(tensor)
    twin = states.copy()
    for n in range(20):
        states[0] = torch.full((2, 6), float(n))
        twin[1] = torch.full((1, 5), float(-n))
    assert torch.equal(twin[0], tensors[0])
    assert torch.equal(states[1], tensors[1])
    assert torch.equal(states[0], torch.full((2, 6), 19.0))
    assert len(states) == len(twin) == 2
    size = (tmp_path / FILE).stat().st_size
    assert (tmp_path / FILE).stat().st_blocks * 512 >= size
    scratch.close()
    assert list(tmp_path.iterdir()) == []


def test_a_narrower_dtype_rounds(tmp_path):
    scratch = Scratch(tmp_path, slots=3, slot_bytes=2 * 8, dtype=torch.bfloat16)
    states, tensor = scratch.states(), torch.randn(8)
    states.append(tensor)
    assert states[0].dtype == torch.float32
    assert torch.equal(states[0], tensor.bfloat16().float())
    scratch.close()


def test_what_is_wrong_is_said(tmp_path):
    scratch = Scratch(tmp_path, slots=2, slot_bytes=100)
    states = scratch.states()
    states.append(torch.zeros(4))
    with (tmp_path / FILE).open("r+b") as opened:
        opened.truncate(10)
    with pytest.raises(CheckpointError, match="cut short while it was in use: 10 bytes of at least"):
        _ = states[0]
    with pytest.raises(OutputError, match=r"need 9,000,000,000,000,000,001 bytes of scratch in"):
        check_room(tmp_path, 9 * 10**18 + 1)
    scratch.close()
