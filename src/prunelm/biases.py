"""Room for a bias where a family's config can say so: repairs then have somewhere to put what is lost on average."""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from .sites import Site, bias_of, configs_of, find_sites, weight_of


def missing_biases(model: PreTrainedModel, names: Collection[str]) -> tuple[list[Site], list[str]]:
    """The sites whose consumer has no bias but could, and the kinds of site whose consumer can have none."""
    without = [s for s in find_sites(model) if s.name in names and bias_of(s.consumer.layer) is None]
    return [s for s in without if s.spec.bias], sorted({s.name for s in without if not s.spec.bias})


def gains_biases(dense: PreTrainedModel, pruned: PreTrainedModel) -> bool:
    """Whether the pruned model gives consumers a bias, other than zeros, that have none in the dense one."""
    without = {site.key for site in find_sites(dense) if bias_of(site.consumer.layer) is None}
    found = (bias_of(site.consumer.layer) for site in find_sites(pruned) if site.key in without)
    return any(bias is not None and bool(bias.any()) for bias in found)


@torch.no_grad()
def add_biases_(model: PreTrainedModel, sites: Collection[Site]) -> int:
    """How many parameters were added: zero biases for every layer that the config's flag gives one."""
    added = 0
    for site in sites:
        assert site.spec.bias is not None
        flag, paths = site.spec.bias
        for path in paths:
            layer = site.root.get_submodule(path)
            if bias_of(layer) is None:
                weight = weight_of(layer)
                layer.bias = nn.Parameter(weight.new_zeros(weight.shape[0]), requires_grad=weight.requires_grad)
                added += weight.shape[0]
        _set_flag_(model, flag, True)
    return added


def remove_biases_(model: PreTrainedModel, sites: Collection[Site]) -> None:
    """Take back what `add_biases_` did."""
    for site in sites:
        assert site.spec.bias is not None
        flag, paths = site.spec.bias
        for path in paths:
            site.root.get_submodule(path).register_parameter("bias", None)
        _set_flag_(model, flag, False)


def _set_flag_(model: PreTrainedModel, flag: str, value: bool) -> None:
    """Set a config flag in the model's config and in those of its own that blocks may have."""
    for config in configs_of(model):
        setattr(config, flag, value)
