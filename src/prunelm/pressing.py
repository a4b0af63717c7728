"""The blocks of a streamed run in the files that stay, and what the result computes, for the proof."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor

from .placement import CPU
from .shelf import META, Shelf
from .stream import BlockStream
from .workbench import Workbench
from .writing import explained


class Pressing:
    """The pruned blocks of a shelf's model, written to a folder as they are finished, and what the result computes.

    Of several processes only the one that writes has such a folder; on the others nothing happens.
    """

    def __init__(self, shelf: Shelf, dtype: torch.dtype, bench: Workbench, ids: Int[Tensor, "1 token"]) -> None:
        self.shelf, self.dtype, self.folder = shelf, dtype, bench.folder
        self._round_()
        self.proof = BlockStream(shelf.model, [{"input_ids": ids.to(shelf.source.device)}])
        shelf.read_outside_()

    @torch.no_grad()
    def finished(self, i: int) -> None:
        """Write block `i`, which is opened, as it now is."""
        if self.folder is None:
            return
        block = self.shelf.blocks[i]
        for parameter in block.parameters():
            parameter.data = parameter.data.to(self.dtype)
        values = {f"{self.shelf.prefix}.{i}.{name}": value.to(CPU) for name, value in block.state_dict().items()}
        partial = self.folder / f".{_shard(i)}.partial"
        with explained(self.folder / _shard(i)):
            save_file({name: value.contiguous() for name, value in values.items()}, partial, metadata={"format": "pt"})
            partial.replace(self.folder / _shard(i))
        for parameter in block.parameters():
            parameter.data = parameter.data.float()
        self.proof.advance(i)

    @torch.no_grad()
    def logits(self) -> Float[Tensor, "row _"]:
        """What the pruned model, as it is written, makes of the proof's tokens; all blocks must be finished."""
        self._round_()
        return self.proof.outputs(0, self.proof.hidden[0]).to(CPU)

    def write(self, folder: Path, further: Mapping[str, Tensor]) -> None:
        """Put the config, all weights and further ones, and their index, into a folder: one file a block and one."""
        assert self.folder is not None
        model, blocks = self.shelf.model, len(self.shelf.blocks)
        outside = {
            name: value.to(CPU)
            for name, value in model.state_dict().items()
            if not name.startswith(f"{self.shelf.prefix}.")
        }
        model.save_pretrained(folder, state_dict={**outside, **further}, max_shard_size="1TB")
        names = [f"model-{n:05d}-of-{blocks + 1:05d}.safetensors" for n in range(1, blocks + 2)]
        (folder / "model.safetensors").rename(folder / names[0])
        for i in range(blocks):
            (self.folder / _shard(i)).rename(folder / names[i + 1])
        _write_index(folder, names)

    def _round_(self) -> None:
        """Give what is in memory the values that are written, in float32."""
        for parameter in self.shelf.model.parameters():
            if parameter.device != META:
                parameter.data = parameter.data.to(self.dtype).float()


def _shard(i: int) -> str:
    return f"weights-{i}.safetensors"


def _write_index(folder: Path, names: list[str]) -> None:
    """Say which file holds which weight, as transformers does."""
    places: dict[str, str] = {}
    size = parameters = 0
    for name in names:
        for key, (shape, begin, end) in _contents(folder / name).items():
            places[key] = name
            size, parameters = size + end - begin, parameters + math.prod(shape)
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _contents(file: Path) -> dict[str, tuple[list[int], int, int]]:
    """Shape, begin and end of every tensor in a file that was written a moment ago."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return {key: (of["shape"], *of["data_offsets"]) for key, of in header.items() if key != "__metadata__"}
