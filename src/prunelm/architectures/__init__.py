"""Model families as data. One file each, found by `config.model_type`; adding one takes no code."""

from ..errors import UnsupportedModelError
from ..registry import Registry, did_you_mean
from ..sites import Architecture, GgufForm, Reader, Relabel, SiteSpec

ARCHITECTURES: Registry[Architecture] = Registry("architecture", "prunelm.architectures")


def architecture(data: Architecture, origin: str) -> Architecture:
    """The data itself, registered under each of its model types."""
    for model_type in data.model_types:
        ARCHITECTURES.register(model_type, data, origin)
    return data


def lookup(model_type: str) -> Architecture:
    """The architecture of a model type.

    Raises:
        UnsupportedModelError: no data for it; the message says why and what to do.
    """
    from .refused import REFUSED

    if model_type in REFUSED:
        raise UnsupportedModelError(f"{model_type} models cannot be pruned here: {REFUSED[model_type]}")
    if model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"no architecture for model_type {model_type!r}. {did_you_mean(model_type, ARCHITECTURES)}"
            f"Supported: {', '.join(ARCHITECTURES)}. Adding one is a single file of about 30 lines: "
            "docs/add-a-model.md."
        )
    return ARCHITECTURES[model_type]


__all__ = ["ARCHITECTURES", "Architecture", "GgufForm", "Reader", "Relabel", "SiteSpec", "architecture", "lookup"]
