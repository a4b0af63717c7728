"""Which units of a dense model a smaller one still has, from its plan or from its weights."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .errors import CheckpointError
from .loading import FORMAT
from .sites import Site, find_sites, weight_of

UNITS = ("group", "query")
TOLERANCE = 0.02
"""Largest relative distance of a unit's producer rows to those of the dense unit that it is taken for."""
Kept = dict[str, Int[Tensor, " kept"]]


def planned_units(plan: Mapping[str, Any] | None, dense: PreTrainedModel) -> tuple[Kept, str] | None:
    """The kept units that a pruning.json names and the kind of its units, if it is about a model of these sizes.

    Raises:
        CheckpointError: it names units that there are not.
    """
    if plan is None or plan.get("format") != FORMAT or "sites" not in plan:
        return None
    unit = plan.get("recipe", {}).get("unit")
    if unit not in UNITS:
        return None
    entries = plan["sites"]
    sites = {site.key: site for site in find_sites(dense, unit)}
    if not set(entries) <= set(sites) or any(entries[key]["units"] != sites[key].n_units for key in entries):
        return None
    for key, entry in entries.items():
        if entry["kept"] != sorted(set(entry["kept"]) & set(range(entry["units"]))):
            raise CheckpointError(f"pruning.json: the kept units of {key} are none of a site of {entry['units']} units")
    return {key: torch.tensor(entry["kept"], dtype=torch.long) for key, entry in entries.items()}, unit


def matched_units(dense: PreTrainedModel, pruned: PreTrainedModel) -> tuple[Kept, str]:
    """The kept units of every site, found by comparing producer rows, and whether they are `group` or `query` units.

    Raises:
        CheckpointError: another depth or shape, or rows of the pruned model that the dense one does not have.
    """
    problem = ""
    for unit in UNITS:
        whole, small = find_sites(dense, unit), find_sites(pruned, unit)
        if [site.key for site in whole] != [site.key for site in small]:
            raise CheckpointError(
                f"the two models cannot be matched: the dense one has {len({s.block for s in whole})} blocks, the "
                f"pruned one {len({s.block for s in small})}"
            )
        found: Kept = {}
        for before, after in zip(whole, small, strict=True):
            kept, problem = _matched(before, after)
            if kept is None:
                break
            found[before.key] = kept
        else:
            return found, unit
    raise CheckpointError(
        f"{problem}. Only models whose units are still those of the dense one can be repaired: was it trained after "
        "pruning, or is this not its dense model?"
    )


def _matched(before: Site, after: Site) -> tuple[Int[Tensor, " kept"] | None, str]:
    """The unit of the dense site that each unit of the smaller one is, or why that cannot be said."""
    paths = {slot.path for slot in before.producers}
    a, b = _signatures(before, paths), _signatures(after, paths)
    if a.shape[1] != b.shape[1] or len(b) > len(a):
        return None, f"{after.key}: its units have another shape than those of the dense model"
    distance = torch.cdist(b, a) / a.norm(dim=1).clamp_min(1e-12)
    least, kept = distance.min(1)
    if float(least.max()) > TOLERANCE:
        worst = int(least.argmax())
        return None, f"{after.key}: unit {worst} is like no unit of the dense model (off by {float(least.max()):.0%})"
    if len(set(kept.tolist())) < len(kept) or not bool((kept.diff() > 0).all()):
        return None, f"{after.key}: its units are not those of the dense model in their order"
    counts = torch.bincount(kept // (before.n_units // before.strata), minlength=before.strata)
    if len(set(counts.tolist())) > 1:
        return None, f"{after.key}: not the same number of query heads is left in every group"
    return kept, ""


def _signatures(site: Site, paths: Collection[str]) -> Float[Tensor, "unit weights"]:
    """The rows of each unit in some producers, one after another."""
    slots = [slot for slot in site.producers if slot.path in paths]
    return torch.cat([weight_of(slot.layer).detach().float()[slot.index].flatten(1) for slot in slots], dim=1)
