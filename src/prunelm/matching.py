"""Which units of a dense model a smaller one still has, from its plan or from its weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from .ascending import ascending
from .errors import CheckpointError
from .loading import FORMAT
from .reconstructions import RECONSTRUCTIONS
from .sites import Site, Slot, architecture_of, find_blocks, find_sites, gone_sites, weight_of

UNITS = ("group", "query")
TOLERANCE = 0.02
"""Largest relative distance of a unit's producer rows to those of the dense unit that it is taken for."""
NAMED = 0.1
"""The same where it is named and needs no telling from others; weights rounded to 8 bits are farther off than above."""
CONSUMER_SHARE = 1e-5
"""What the consumer's columns count beside the producers' rows: enough to tell units whose rows are equal."""
OTHERWISE = (
    "Only models whose units are still those of the dense one can be repaired: was it trained after pruning, or is "
    "this not its dense model?"
)
UNLIKE, GIVE = "the two models cannot be matched", "Give the model that it was pruned from."
OTHER_SHAPE = "its units have another shape than those of the dense model"
Kept = dict[str, Int[Tensor, " kept"]]


def check_family(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Raise unless the pruned model has the dense one's blocks, in its words or in those that it may be written in.

    Raises:
        CheckpointError: another family, another depth, or other sites; names what differs.
    """
    own, other = dense.config.model_type, pruned.config.model_type
    if other not in {own, *(relabel.model_type for relabel in architecture_of(dense.config).relabels)}:
        raise CheckpointError(f"{UNLIKE}: the dense one is {own}, the pruned one {other}. {GIVE}")
    before, after = len(find_blocks(dense)[1]), len(find_blocks(pruned)[1])
    if before != after:
        raise CheckpointError(f"{UNLIKE}: the dense one has {before} blocks, the pruned one {after}. {GIVE}")
    ours, theirs = ({site.key for site in find_sites(model)} for model in (dense, pruned))
    differing = (theirs - ours) | (ours - theirs - gone_sites(pruned).keys())
    if differing:
        first = min(differing)
        here, there = ("dense", "pruned") if first in ours else ("pruned", "dense")
        raise CheckpointError(
            f"{UNLIKE}: the {here} one has {first}, the {there} one has not ({len(differing)} such sites). {GIVE}"
        )


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


def check_planned(
    plan: Mapping[str, Any], kept: Kept, unit: str, dense: PreTrainedModel, pruned: PreTrainedModel
) -> list[str]:
    """What to tell of a comparison of the two models: nothing, where producers of all named units could be compared.

    Where the plan's own reconstruction has changed producers, the embeddings are compared in their place.

    Raises:
        CheckpointError: they are not those of the dense model.
    """
    name = plan.get("recipe", {}).get("reconstruction", "none")
    if name not in RECONSTRUCTIONS or RECONSTRUCTIONS[name].stage == "refit":
        _check_embeddings(dense, pruned)
        return [
            f"the pruned model's reconstruction {name!r} has changed the producers of its units, so only its "
            "embeddings could be compared with those of the dense one"
        ]
    small = {site.key: site for site in find_sites(pruned, unit)}
    for site in find_sites(dense, unit):
        units = kept.get(site.key, torch.arange(site.n_units))
        after = small.get(site.key)
        if len(units) != (after.n_units if after else 0):
            raise CheckpointError(
                f"pruning.json: {len(units)} units of {site.key} stay, and the pruned model has "
                f"{after.n_units if after else 0}: the two files are not of one model"
            )
        if after is not None:
            _check_rows(site, after, units)
    return []


def _check_embeddings(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Raise unless the tokens that both models know have the same embeddings."""
    a, b = (model.get_input_embeddings().weight.detach().float() for model in (dense, pruned))
    known = min(len(a), len(b))
    same = a.shape[1] == b.shape[1]
    if not same or float(_apart(a[:known].reshape(1, -1), b[:known].to(a).reshape(1, -1))) > TOLERANCE:
        raise CheckpointError(f"the embeddings of the pruned model are not those of the dense model. {OTHERWISE}")


def _check_rows(before: Site, after: Site, units: Int[Tensor, " kept"]) -> None:
    """Raise unless each unit of the smaller site has the producer rows of the dense one that it is said to be."""
    a, b = _rows(before, after)
    if a.shape[1] != b.shape[1]:
        raise CheckpointError(f"{after.key}: {OTHER_SHAPE}. {OTHERWISE}")
    off = _apart(a[units], b)
    worst = int(off.argmax())
    if float(off[worst]) > NAMED:
        raise CheckpointError(
            f"{after.key}: pruning.json says that unit {worst} is unit {int(units[worst])} of the dense model, and it "
            f"is not (off by {float(off[worst]):.0%}). {OTHERWISE}"
        )


def matched_units(dense: PreTrainedModel, pruned: PreTrainedModel) -> tuple[Kept, str]:
    """The kept units of every site, found by comparing producer rows, and whether they are `group` or `query` units.

    Where rows are equal, or nothing but zeros, the order of the units and the consumer's columns tell them.

    Raises:
        CheckpointError: another shape, or rows of the pruned model that the dense one does not have.
    """
    problems: list[str] = []
    for unit in UNITS:
        small = {site.key: site for site in find_sites(pruned, unit)}
        found: Kept = {}
        for before in find_sites(dense, unit):
            after = small.get(before.key)
            if after is None:
                found[before.key] = torch.empty(0, dtype=torch.long)
                continue
            kept, problem = _matched(before, after)
            if kept is None:
                problems.append(problem)
                break
            found[before.key] = kept
        else:
            return found, unit
    fitting = [problem for problem in problems if OTHER_SHAPE not in problem]
    raise CheckpointError(f"{[*fitting, *problems][0]}. {OTHERWISE}")


def _matched(before: Site, after: Site) -> tuple[Int[Tensor, " kept"] | None, str]:
    """The unit of the dense site that each unit of the smaller one is, or why that cannot be said."""
    a, b = _rows(before, after)
    if a.shape[1] != b.shape[1] or len(b) > len(a):
        return None, f"{after.key}: {OTHER_SHAPE}"
    if len(b) % before.strata:
        return None, f"{after.key}: not the same number of query heads is left in every group"
    apart = _all_apart(a, b)
    least = apart.min(1).values
    if float(least.max()) > TOLERANCE:
        worst = int(least.argmax())
        return None, f"{after.key}: unit {worst} is like no unit of the dense model (off by {float(least.max()):.0%})"
    cost = apart.square()
    if int((apart <= TOLERANCE).sum(1).max()) > 1:
        cost += CONSUMER_SHARE * _all_apart(_columns(before), _columns(after).to(a)).square()
    few, many = len(b) // before.strata, len(a) // before.strata
    runs = [cost[s * few : (s + 1) * few, s * many : (s + 1) * many] for s in range(before.strata)]
    kept = torch.cat([ascending(run) + s * many for s, run in enumerate(runs)])
    if float(apart.gather(1, kept.to(a.device)[:, None]).max()) > TOLERANCE:
        return None, f"{after.key}: its units are not those of the dense model in their order"
    return kept, ""


def _rows(before: Site, after: Site) -> tuple[Float[Tensor, "unit weights"], Float[Tensor, "kept others"]]:
    """The rows of each unit in the producers that narrow the dense site, one after another; of both, on one device."""
    names = _producers(before).keys() & _producers(after).keys()
    a, b = (_signatures(site, sorted(names), per_query=before.per_query) for site in (before, after))
    return a, b.to(a.device)


def _producers(site: Site) -> dict[str, Slot]:
    """The slots of the producers, by their paths in the block."""
    own = {slot.layer: slot for slot in site.producers}
    layers = {name: site.root.get_submodule(name) for name in site.spec.producers}
    return {name: own[layer] for name, layer in layers.items() if layer in own}


def _signatures(site: Site, names: Sequence[str], *, per_query: bool) -> Float[Tensor, "unit weights"]:
    """The rows of each unit in some producers, one after another; with `per_query`, of its query heads alone.

    A site with one query head for each KV head is found as one of groups, whatever it was before.
    """
    found = []
    for name in names:
        slot, rows = _producers(site)[name], weight_of(_producers(site)[name].layer).detach().float()
        words = [part.strip() for chunk in site.spec.producers[name].split("|") for part in chunk.split("+")]
        all_ = site.per_query or not per_query
        parts = [p for k, p in enumerate(slot.parts) if all_ or words[k] == "group"]
        found.append(rows[torch.cat(parts, dim=1)].flatten(1))
    return torch.cat(found, dim=1)


def _columns(site: Site) -> Float[Tensor, "unit weights"]:
    """The columns of each unit in the consumer."""
    return weight_of(site.consumer.layer).detach().float().T[site.consumer.index].flatten(1)


def _apart(a: Float[Tensor, "unit weights"], b: Float[Tensor, "unit weights"]) -> Float[Tensor, " unit"]:
    """The distance of each pair of rows, relative to the longer of the two."""
    off: Tensor = (a - b).norm(dim=1) / torch.maximum(a.norm(dim=1), b.norm(dim=1)).clamp_min(1e-30)
    return off


def _all_apart(a: Float[Tensor, "unit weights"], b: Float[Tensor, "kept weights"]) -> Float[Tensor, "kept unit"]:
    """The distance of every row of `b` to every row of `a`, relative to the longer of the two."""
    return torch.cdist(b, a) / torch.maximum(b.norm(dim=1)[:, None], a.norm(dim=1)).clamp_min(1e-30)
