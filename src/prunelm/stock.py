"""What plain `transformers` can say: a config with given sizes, in the family's own words or in another's.

Nothing is assumed: the candidate config is built by `transformers` itself, whose validators decide.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .sites import architecture_of

_WRITTEN_ELSEWHERE = ("model_type", "transformers_version", "architectures", "_name_or_path")


def stock_config(config: PreTrainedConfig, values: Mapping[str, int]) -> PreTrainedConfig | None:
    """A stock config with the given fields, relabeled where only that can say them; None if nothing stock can."""
    own = _build(config.model_type, config, values, {})
    if own is not None:
        return own
    relabel = architecture_of(config).relabel
    if relabel is None or any(getattr(config, name, None) != value for name, value in relabel.when.items()):
        return None
    return _build(relabel.model_type, config, values, relabel.set)


def _build(
    model_type: str, config: PreTrainedConfig, values: Mapping[str, int], extra: Mapping[str, Any]
) -> PreTrainedConfig | None:
    fields: dict[str, Any] = {k: v for k, v in config.to_dict().items() if k not in _WRITTEN_ELSEWHERE}
    fields |= {config.attribute_map.get(name, name): value for name, value in values.items()}
    try:
        built = AutoConfig.for_model(model_type, **{**fields, **extra})
    except (StrictDataclassError, ValueError):
        return None
    if config.architectures:
        old, new = type(config).__name__.removesuffix("Config"), type(built).__name__.removesuffix("Config")
        built.architectures = [name.replace(old, new, 1) for name in config.architectures]
    return built
