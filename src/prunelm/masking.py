"""Units silenced while a model runs: consumers that read zeros, and blocks stepped over."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .sites import Site, find_blocks, weight_of
from .stream import forwards_replaced, pass_on


class Mask:
    """What stays of a model, as the hooks of `masking` read it."""

    def __init__(self, model: PreTrainedModel, sites: Sequence[Site]) -> None:
        self.sites = sites
        self.blocks = find_blocks(model)[1]
        self.columns: dict[str, Tensor] = {}
        self._skipped = contextlib.ExitStack()

    def open(self) -> None:
        """Keep everything."""
        self.columns = {}
        self._skipped.close()

    def keep(self, kept: Mapping[str, Int[Tensor, " kept"]]) -> None:
        """Keep these units of the sites, and everything else."""
        self.open()
        for site in self.sites:
            if site.key in kept:
                weight = weight_of(site.consumer.layer)
                columns = torch.zeros_like(weight[0])
                columns[site.consumer.keep(kept[site.key])] = 1.0
                self.columns[site.key] = columns

    def skip(self, blocks: Collection[int]) -> None:
        """Step over some blocks, and keep everything else."""
        self.open()
        self._skipped.enter_context(forwards_replaced(dict.fromkeys((self.blocks[i] for i in blocks), pass_on)))

    def reader(self, site: Site) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        """The hook of a site's consumer."""

        def read(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            columns = self.columns.get(site.key)
            return None if columns is None else (args[0] * columns, *args[1:])

        return read


@contextlib.contextmanager
def masking(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[Mask]:
    """While open, the model runs as the mask says, which keeps everything at first.

    A dropped unit's columns of the consumer read zeros, which is what removing it does.
    """
    mask = Mask(model, sites)
    handles = [site.consumer.layer.register_forward_pre_hook(mask.reader(site)) for site in sites]
    try:
        yield mask
    finally:
        mask.open()
        for handle in handles:
            handle.remove()
