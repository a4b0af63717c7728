"""The weights of a checkpoint, read from its files one at a time."""

from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from .errors import CheckpointError
from .loading import Source, unmapped


class StoredWeights:
    """What .safetensors files hold of a model's parameters, by the names that these have in the model."""

    def __init__(self, name: str, slices: Mapping[str, Any], prefix: str) -> None:
        self.name, self._slices, self._prefix = name, slices, prefix

    @classmethod
    def of(cls, source: Source, model: PreTrainedModel) -> "StoredWeights | None":
        """Those of a checkpoint, `model` being its shapes; None where it has no .safetensors files."""
        slices = unmapped(source.folder) if source.gguf is None else None
        return None if slices is None else cls(source.name, slices, model.base_model_prefix)

    def __contains__(self, name: str) -> bool:
        return self._found(name) is not None

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter on the CPU, in the dtype that it is stored in.

        Raises:
            CheckpointError: no file holds that name, it cannot be read, or it has another shape.
        """
        found = self._found(name)
        if found is None:
            raise CheckpointError(
                f"{self.name}: no file holds {name!r} under that name. transformers may know how to convert "
                "this checkpoint: leave --stream out, or load it once and save it again."
            )
        try:
            value: Tensor = found if isinstance(found, Tensor) else found[:]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.name}: {name} cannot be read ({error}). Get the file again.") from error
        if value.shape != shape:
            raise CheckpointError(f"{self.name}: {name} is {tuple(value.shape)}, and the config says {tuple(shape)}")
        return value

    def _found(self, name: str) -> Any:
        """The slice of a parameter, with the base model's prefix or without it."""
        return self._slices.get(name, self._slices.get(name.removeprefix(f"{self._prefix}.")))
