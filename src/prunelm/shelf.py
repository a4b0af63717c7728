"""A model whose blocks stay in their files and are taken into memory one at a time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .dequantizing import quantization_of
from .errors import CheckpointError, RecipeError
from .heap import release_memory
from .loading import Source, generation_config, skeleton
from .sites import find_blocks
from .stored_weights import StoredWeights
from .stream import BlockStream, Room, forwards_replaced

META = torch.device("meta")


def check_plain(source: Source) -> None:
    """Raise unless weights are plain numbers in .safetensors files, which can be read block by block.

    Raises:
        RecipeError: says what they are.
    """
    if source.gguf is not None:
        raise RecipeError("--stream reads .safetensors block by block, and this is a .gguf file: leave it out")
    if quantization_of(source.config(), source.name) is not None:
        raise RecipeError("--stream reads plain weights, and this checkpoint is quantized: leave it out")


class Shelf:
    """The weights of one model by name, and the model, of which only what lies outside the blocks is in memory."""

    def __init__(
        self, source: Source, dtype: torch.dtype = torch.float32, *, model: PreTrainedModel | None = None
    ) -> None:
        self.source, self.dtype = source, dtype
        self.model = (skeleton(source, buffers=True) if model is None else model).eval()
        stored = StoredWeights.of(source, self.model)
        if stored is None:
            raise CheckpointError(f"{source.name}: --stream reads .safetensors files block by block, and it has none")
        self._stored = stored
        own = generation_config(source.folder)
        if own is not None:
            self.model.generation_config = own
        self.prefix, self.blocks = find_blocks(self.model)
        self._names = {name for name, _ in self.model.named_parameters()}
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(source.device))
        self.read_outside_()

    @torch.no_grad()
    def read_outside_(self) -> None:
        """Read all weights that lie outside the blocks, and tie those that the config ties."""
        missing = set()
        for name in self._names:
            if not name.startswith(f"{self.prefix}."):
                if name in self._stored:
                    self._put(name, self.model.get_parameter(name))
                else:
                    missing.add(name)
        self.model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for name in sorted(missing):
            self._put(name, self.model.get_parameter(name))

    @contextlib.contextmanager
    def opened(self, i: int) -> Iterator[None]:
        """Block `i` is in memory while the body runs; afterwards only its shapes are.

        What it took goes back to the system: weights freed in glibc's heap stayed there, up to 14 MB of every block.
        """
        block = self.blocks[i]
        if any(parameter.device != META for parameter in block.parameters()):
            yield
            return
        for name, parameter in list(block.named_parameters()):
            self._put(f"{self.prefix}.{i}.{name}", parameter)
        try:
            yield
        finally:
            for name, parameter in list(block.named_parameters()):
                _replace(block, name, torch.empty_like(parameter, device=META))
            release_memory()

    @contextlib.contextmanager
    def running(self) -> Iterator["Shelf"]:
        """While open, a block that runs is taken into memory for that time, so that the model runs as any other."""
        forwards = {block: partial(self._run, i, block.forward) for i, block in enumerate(self.blocks)}
        with forwards_replaced(forwards):
            yield self

    def _run(self, i: int, forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        with self.opened(i):
            return forward(*args, **kwargs)

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        """Give a parameter of the model its stored values."""
        if name not in self._names:
            # Biases that a recipe added begin as zeros.
            _replace(self.model, name, torch.zeros(parameter.shape, dtype=self.dtype, device=self.source.device))
            return
        value = self._stored.read(name, parameter.shape)
        _replace(self.model, name, value.to(self.source.device, self.dtype))

    @torch.no_grad()
    def logits(self, ids: Int[Tensor, "1 token"]) -> Float[Tensor, "row _"]:
        """What the model makes of some tokens, its blocks passing through memory one by one."""
        stream = self.passed([ids])
        return stream.outputs(0, stream.hidden[0])

    def passed(
        self, windows: Sequence[Int[Tensor, "1 token"]], told: Callable[[int], None] | None = None
    ) -> BlockStream:
        """A stream of some windows behind the last block; `told` which block is read next."""
        batches = [{"input_ids": ids.to(self.source.device)} for ids in windows]
        stream = BlockStream(self.model, batches, Room(opened=self.opened))
        for i in range(len(self.blocks)):
            if told is not None:
                told(i)
            with self.opened(i):
                stream.advance(i)
        return stream


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module another parameter of that name, wherever in it the parameter is."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner).register_parameter(leaf, nn.Parameter(value))
