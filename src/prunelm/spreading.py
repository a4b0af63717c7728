"""A model spread over several GPUs, whole blocks on each, by accelerate's device maps."""

from collections.abc import Mapping

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

from .errors import DeviceError
from .placement import CPU
from .sites import find_blocks

Places = Mapping[str, torch.device | int | str]
"""accelerate's device map: where each module is, by its name in the model."""
SHARE = 0.7
"""Of a GPU's free memory, what weights may take; the rest is for statistics and activations."""


def spread(model: PreTrainedModel, places: Places | None = None) -> PreTrainedModel:
    """The model with its blocks on several devices: by default divided evenly over this machine's GPUs.

    Statistics and solves of a block are made on its device; hidden states move when they enter it.

    Args:
        model: in memory.
        places: where its modules go; the first is where batches go in and logits come out.

    Raises:
        DeviceError: the GPUs cannot hold it; says how much it needs and how much is free.
    """
    chosen = dict(_divided(model) if places is None else places)
    main = next(iter(chosen.values()))
    found: PreTrainedModel = dispatch_model(
        model,
        chosen,
        main_device=main,
        skip_keys=getattr(model, "_skip_keys_device_placement", None),
        force_hooks=True,
    )
    return found


def _divided(model: PreTrainedModel) -> Places:
    kinds = list({type(block).__name__ for block in find_blocks(model)[1]})
    free = {i: round(SHARE * torch.cuda.mem_get_info(i)[0]) for i in range(torch.cuda.device_count())}
    memory = get_balanced_memory(model, max_memory=dict(free), no_split_module_classes=kinds)
    places: Places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=kinds)
    if any(place in ("cpu", "disk") for place in places.values()):
        needed = sum(p.numel() * p.element_size() for p in model.parameters())
        raise DeviceError(
            f"--device auto: the weights need {needed:,} bytes, and {len(free)} GPUs have {sum(free.values()):,} for "
            f"them ({SHARE:.0%} of what is free). Use --compute-dtype bfloat16, or --stream with a --device."
        )
    return places


def gathered(model: PreTrainedModel) -> PreTrainedModel:
    """The model in the machine's memory, wherever it was."""
    if hasattr(model, "hf_device_map"):
        remove_hook_from_submodules(model)
        del model.hf_device_map
    return model.to(CPU)
