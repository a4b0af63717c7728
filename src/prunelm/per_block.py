"""Folders whose blocks differ, for plain transformers: the modeling file they carry, and the names that go with it.

The file is made from one template and the family's data. Nothing in it is copied from modeling code of others.
"""

from collections.abc import Iterable, Mapping
from importlib import resources
from string import Template
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from .hidden import built_width
from .sites import Architecture, SiteSpec, architecture_of, gone_sites

STORED = "prunelm-"
"""Before the model type in config.json: no loader knows such a type, so none builds something else from it."""
CLASS = "PerBlock"
_AUTO = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def carries_code(model: PreTrainedModel) -> bool:
    """Whether the modeling file can say the model: sizes of blocks, but no empty sublayer and no narrower stream."""
    return built_width(model) is None and not gone_sites(model)


def modeling_file(model: PreTrainedModel) -> tuple[str, str]:
    """The name and the text of a module that opens the pruned model without PruneLM."""
    config = type(model.config).__name__
    classes = sorted({*_classes(model).values(), type(model).__name__})
    architecture = architecture_of(model.config)
    text = Template(resources.files(__package__).joinpath("per_block_template.txt").read_text(encoding="utf-8"))
    return f"{_module(model)}.py", text.substitute(
        family=config.removesuffix("Config"),
        imports="".join(f"\n    {name}," for name in sorted([config, "PreTrainedModel", *classes])),
        stored_as=STORED + model.config.model_type,
        model_type=model.config.model_type,
        config_class=config,
        bare=_classes(model)["AutoModel"],
        blocks=architecture.blocks,
        heads=_tuple(dict.fromkeys(name for spec in architecture.sites for name in _heads(spec))),
        sizes=_tuple(dict.fromkeys(name for spec in architecture.sites for name in spec.config_fields)),
        layers="".join(f"\n    {row}," for row in _layers(architecture)),
        attributes="".join(f"\n    {row},\n" for row in _attributes(architecture)).replace("\n\n", "\n"),
        classes="\n\n\n".join(
            f"class {CLASS}{name}(_PerBlock, {name}):\n    config_class = {CLASS}{config}" for name in classes
        ),
    )


def stored_names(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says so that transformers finds that module, if there is one, and every other loader stops."""
    config = type(model.config).__name__
    names = {"AutoConfig": config, **_classes(model)}
    found = {"model_type": STORED + model.config.model_type, "architectures": [CLASS + type(model).__name__]}
    if not carries_code(model):
        return found
    return {**found, "auto_map": {auto: f"{_module(model)}.{CLASS}{name}" for auto, name in names.items()}}


def stock_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json in the words of stock transformers, whoever wrote it."""
    found = dict(raw)
    kind, names = found.get("model_type"), found.get("architectures")
    if isinstance(kind, str) and kind.startswith(STORED):
        found["model_type"] = kind.removeprefix(STORED)
        found.pop("auto_map", None)
    if isinstance(names, list):
        found["architectures"] = [name.removeprefix(CLASS) if isinstance(name, str) else name for name in names]
    return found


def _module(model: PreTrainedModel) -> str:
    return f"modeling_{model.config.model_type}_per_block"


def _classes(model: PreTrainedModel) -> dict[str, str]:
    """Stock classes of the family by the automatic class that finds them."""
    kind = model.config.model_type
    found = {auto: getattr(modeling_auto, table).get(kind) for auto, table in _AUTO.items()}
    return {auto: name for auto, name in found.items() if isinstance(name, str)}


def _parts(spec: SiteSpec, layout: str) -> list[str]:
    """The config fields that add up to the length of an axis, head counts among them in heads."""
    queries = next((name for name, measure in spec.config_fields.items() if measure == "queries"), spec.count)
    names = [part.strip() for chunk in layout.split("|") for part in chunk.split("+")]
    return [queries if name == "group" else spec.count for name in names]


def _heads(spec: SiteSpec) -> list[str]:
    layouts = [*spec.producers.values(), spec.consumer[1]]
    return [] if spec.probabilities is None else [name for layout in layouts for name in _parts(spec, layout)]


def _layers(architecture: Architecture) -> list[str]:
    rows = []
    for spec in architecture.sites:
        axes = [(path, "out", layout) for path, layout in spec.producers.items()]
        for path, axis, layout in [*axes, (spec.consumer[0], "in", spec.consumer[1])]:
            rows.append(f'("{path}", "{axis}", {_tuple(_parts(spec, layout))})')
    return rows


def _attributes(architecture: Architecture) -> list[str]:
    return [_tuple(pair) for spec in architecture.sites for pair in spec.attributes.items()]


def _tuple(names: Iterable[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return f"({', '.join(quoted)}{',' if len(quoted) == 1 else ''})"
