"""Whole blocks removed, the ones that change their input least: the reference that width pruning is compared with."""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from .errors import BudgetError
from .placement import exact
from .sites import configs_of, find_blocks
from .stream import Batch, BlockStream


@torch.no_grad()
def block_influence(model: PreTrainedModel, batches: Sequence[Batch]) -> Float[Tensor, " block"]:
    """1 - E[cos(h_in, h_out)] of every block over tokens: 0 for a block that changes no direction.

    One forward pass of the batches.

    Source: arXiv 2403.03853 (ShortGPT), Block Influence.
    """
    stream = BlockStream(model, batches)
    found = torch.zeros(len(stream.blocks), dtype=torch.float64)
    for i in range(len(stream.blocks)):
        cosines = []
        for b in range(len(batches)):
            entering = stream.hidden[b]
            stream.hidden[b] = stream.run(i, b)
            before, after = (exact(stream.tokens(hidden, b)) for hidden in (entering, stream.hidden[b]))
            cosines.append(cosine_similarity(before, after, dim=-1))
        found[i] = 1 - float(torch.cat(cosines).mean())
    return found


def drop_blocks_(model: PreTrainedModel, drop: Collection[int]) -> None:
    """Remove blocks from a model, in place; the others are renumbered, and the config says how many there are.

    Config values that are one per block lose the same entries.

    Raises:
        BudgetError: a block that does not exist, or nothing would stay.
    """
    path, blocks = find_blocks(model)
    n = len(blocks)
    if not set(drop) <= set(range(n)) or len(set(drop)) == n:
        raise BudgetError(f"cannot drop blocks {sorted(set(drop))} of {n}: name some of 0 to {n - 1}, not all")
    kept = [i for i in range(n) if i not in set(drop)]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[i] for i in kept))
    for config in configs_of(model):
        for key, value in vars(config).items():
            if isinstance(value, list) and len(value) == n:
                setattr(config, key, [value[i] for i in kept])
        config.num_hidden_layers = len(kept)
    for now, block in enumerate(find_blocks(model)[1]):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = now  # type: ignore[assignment]
