"""What a layer of a block gave for each batch, given again where the block runs once more with the same input to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .stream import forwards_replaced


class LayerOutputs:
    """Outputs of one layer by batch; each is given again once, in place of computing it, and then forgotten.

    A layer that gives something beside its output, such as attention probabilities, is computed again.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self._kept: dict[int, Any] = {}

    @contextmanager
    def of(self, b: int) -> Iterator[None]:
        """While open, the layer gives its output of batch `b` if that is known; else it is kept."""
        if b in self._kept:
            known = self._kept.pop(b)
            with forwards_replaced({self.layer: lambda *_args, **_kwargs: known}):
                yield
            return

        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) or all(part is None for part in output[1:]):
                self._kept[b] = output

        handle = self.layer.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
