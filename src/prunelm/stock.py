"""What plain `transformers` can say: a config with given sizes, in the family's own words or in another's.

Nothing is assumed: the candidate config is built by `transformers` itself, whose validators decide. What other programs
read of it is data of the family.
"""

from collections.abc import Collection, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from .sites import Relabel, architecture_of

_WRITTEN_ELSEWHERE = ("model_type", "transformers_version", "architectures", "_name_or_path")


def stock_config(
    config: PreTrainedConfig, values: Mapping[str, int], readers: Collection[str] = ()
) -> PreTrainedConfig | None:
    """A stock config with the given fields that all readers take at its word; None if there is none.

    Args:
        config: of the model, or of its dense parent.
        values: fields with new sizes.
        readers: programs beside transformers, by their names in architecture data.
    """
    own = _build(config.model_type, config, values)
    if own is not None and _is_read(own, readers):
        return own
    for relabel in architecture_of(config).relabels:
        if all(getattr(config, name, None) == value for name, value in relabel.when.items()):
            other = _build(relabel.model_type, config, values, relabel)
            if other is not None and _is_read(other, readers):
                return other
    return None


def why_relabeled(config: PreTrainedConfig, written: PreTrainedConfig, readers: Collection[str] = ()) -> str | None:
    """One sentence that says under which other model type a model is written, and why; None if under its own."""
    if written.model_type == config.model_type:
        return None
    heads, head_dim = written.num_attention_heads, written.head_dim
    values = {name: getattr(written, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")}
    deaf = [reader for reader in readers if not _reads_head_dim(config.model_type, reader)]
    why = f"{' and '.join(deaf)} takes the size of a head from hidden size and number of heads"
    if _build(config.model_type, config, values) is None:
        why = f"its stock config refuses {heads} heads with hidden size {written.hidden_size}"
    return (
        f"{config.model_type} is written as {written.model_type}, which computes the same: {heads} heads of size "
        f"{head_dim} stay, and {why}"
    )


def _is_read(config: PreTrainedConfig, readers: Collection[str]) -> bool:
    """Whether every reader builds heads of the config's size."""
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = getattr(config, "head_dim", None)
    usual = head_dim is None or heads * head_dim == config.hidden_size
    return usual or all(_reads_head_dim(config.model_type, reader) for reader in readers)


def _reads_head_dim(model_type: str, reader: str) -> bool:
    from .architectures import lookup

    known = lookup(model_type).readers.get(reader)
    return known is not None and known.head_dim


def _build(
    model_type: str, config: PreTrainedConfig, values: Mapping[str, int], relabel: Relabel | None = None
) -> PreTrainedConfig | None:
    fields: dict[str, Any] = {k: v for k, v in config.to_dict().items() if k not in _WRITTEN_ELSEWHERE}
    fields |= {config.attribute_map.get(name, name): value for name, value in values.items()}
    if relabel is not None:
        fields = {k: v for k, v in fields.items() if k not in relabel.drop} | dict(relabel.set)
        if relabel.scale is not None:
            head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
            fields[relabel.scale] = head_dim**-0.5
    try:
        built = AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ValueError):
        return None
    if config.architectures:
        old, new = type(config).__name__.removesuffix("Config"), type(built).__name__.removesuffix("Config")
        built.architectures = [name.replace(old, new, 1) for name in config.architectures]
    return built
