"""Fisher matrices with one block in memory at a time: forward through all blocks, then back through each alone."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from .fisher import adder, finite
from .losses import drawn_loss
from .placement import statistics_device
from .sites import Site, by_block, weight_of
from .stream import Batch, BlockStream, Room, States, blocks_skipped
from .workbench import Step, Workbench


class KeptFisher(Mapping[str, Tensor]):
    """Fisher matrices on a workbench, by site key; each is read when it is asked for."""

    def __init__(self, bench: Workbench, sites: Sequence[Site]) -> None:
        self._bench, self._place = bench, {site.key: site.block for site in sites}

    def __getitem__(self, key: str) -> Float[Tensor, "out out"]:
        step = self._bench.get(f"fisher-{self._place[key]}")
        if step is None:
            raise KeyError(key)
        return step.tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def whole(self) -> bool:
        """Whether all of them are there."""
        return all(self._bench.get(f"fisher-{i}") is not None for i in set(self._place.values()))


def streamed_fisher(
    model: PreTrainedModel, batches: Sequence[Batch], sites: Sequence[Site], room: Room, bench: Workbench, *, seed: int
) -> KeptFisher:
    """What `output_fisher` gives, bit for bit, on the bench.

    The states that enter every block are kept; from the last block on, each is run again from its own, and passes the
    gradient of its output on to its input. Every block is opened twice, whatever the number of batches.

    Raises:
        CalibrationError: a gradient is not finite; names the site.
    """
    found = KeptFisher(bench, sites)
    if found.whole:
        return found
    stream = BlockStream(model, batches, room)
    entering: list[States] = []
    for i in range(len(stream.blocks)):
        entering.append(stream.hidden.copy())
        with room.opened(i):
            stream.advance(i)
    rows = _answer_(stream, torch.Generator().manual_seed(seed))
    groups = by_block(sites)
    for i in reversed(range(min(groups), len(stream.blocks))):
        with room.opened(i):
            matrices = _passed_back_(stream, i, entering.pop(), groups.get(i, ()))
        for key, matrix in matrices.items():
            finite(key, matrix)
        if matrices:
            step = Step(tensors={key: matrix / max(rows, 1) for key, matrix in matrices.items()})
            bench.put(f"fisher-{i}", step)
    return found


def _answer_(stream: BlockStream, generator: torch.Generator) -> int:
    """Put the gradient of the drawn loss in place of the hidden states behind the last block; how many rows it had."""
    rows = 0
    for b, batch in enumerate(stream.batches):
        hidden = stream.hidden[b].detach().requires_grad_()
        with torch.enable_grad(), blocks_skipped(stream.blocks, hidden):
            loss, seen = drawn_loss(stream.model, batch, generator)
        (gradient,) = torch.autograd.grad(loss, hidden)
        stream.hidden[b] = gradient
        rows += seen
    return rows


def _passed_back_(
    stream: BlockStream, i: int, entering: States, sites: Sequence[Site]
) -> dict[str, Float[Tensor, "out out"]]:
    """Sums of g g^T of each site, and in place of the gradients behind block `i` those before it."""
    block, place = stream.blocks[i], statistics_device(stream.model.device)
    sizes = {site.key: len(weight_of(site.consumer.layer)) for site in sites}
    sums = {key: torch.zeros(n, n, dtype=torch.float64, device=place) for key, n in sizes.items()}
    handles = [site.consumer.layer.register_forward_hook(adder(sums[site.key])) for site in sites]
    block.requires_grad_(False)
    try:
        for b in range(len(stream.batches)):
            args, kwargs = stream.calls[i][b]
            hidden = entering[b].detach().requires_grad_()
            with torch.enable_grad():
                result = block(hidden, *args, **kwargs)
                left = result[0] if isinstance(result, tuple) else result
            (gradient,) = torch.autograd.grad(left, hidden, stream.hidden[b])
            stream.hidden[b] = gradient
    finally:
        block.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return sums
