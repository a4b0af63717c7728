"""What a plan means, block by block: units, parameters, bytes, cache, operations, and the divergence to expect."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from .allocation import Outlook
from .job import Job
from .sensitivity import damage_of
from .sites import Site, find_blocks
from .storage import Stored, cache_bytes_of, stored_after, stored_bytes

SHOWN = ("f16", "q8_0", "q4_0")
"""Formats whose bytes are shown."""
LOOKED_UP = ("embeddings", "positions")
"""Parts that no token is multiplied with."""
OUTSIDE = "outside"
"""The row of what is in no block: embeddings, the output, the last norm."""


def outline(model: PreTrainedModel, job: Job, context: int, outlook: Outlook | None = None) -> list[dict[str, Any]]:
    """One row for each block, one for what is outside them, one for all.

    `units` are those kept out of how many, per kind of site; `flops` the floating-point operations of one token that
    sees `context` tokens; `kl` the divergence to expect at the output, where it was priced. Kinds that a block has none
    of are left out.
    """
    counts = {site.key: job.keeps(site) for site in job.everything}
    tensors = stored_after(model, job.everything, counts)
    rows = []
    for i in range(len(find_blocks(model)[1])):
        sites = [site for site in job.everything if site.block == i]
        row = _row(str(i), [tensor for tensor in tensors if tensor.block == i], sites, counts, context)
        rows.append({**row, "kl": _expected(sites, counts, outlook)})
    rest = [tensor for tensor in tensors if tensor.block is None]
    rows.append({**_row(OUTSIDE, rest, [], counts, context), "kl": None})
    return [*rows, _total(rows)]


def _row(
    name: str, tensors: list[Stored], sites: list[Site], counts: Mapping[str, int], context: int
) -> dict[str, Any]:
    heads = [site for site in sites if site.spec.probabilities is not None]
    attended = sum(site.measures(counts[site.key])["queries"] * site.head_dim for site in heads)
    multiplied = sum(t.entries for t in tensors if len(t.shape) > 1 and t.part not in LOOKED_UP)
    return {
        "block": name,
        "units": {site.name: [counts[site.key], site.n_units] for site in sites},
        "parameters": sum(tensor.entries for tensor in tensors),
        "bytes": {form: stored_bytes(tensors, form) for form in SHOWN},
        "cache": cache_bytes_of(sites, counts, context),
        "flops": 2 * multiplied + 4 * attended * context,
    }


def _total(rows: list[dict[str, Any]]) -> dict[str, Any]:
    units: dict[str, list[int]] = {}
    for row in rows:
        for name, (kept, whole) in row["units"].items():
            before = units.get(name, [0, 0])
            units[name] = [before[0] + kept, before[1] + whole]
    kl = [row["kl"] for row in rows if row["kl"] is not None]
    return {
        "block": "all",
        "units": units,
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": {form: sum(row["bytes"][form] for row in rows) for form in SHOWN},
        "cache": sum(row["cache"] for row in rows),
        "flops": sum(row["flops"] for row in rows),
        "kl": sum(kl) if kl else None,
    }


def _expected(sites: list[Site], counts: Mapping[str, int], outlook: Outlook | None) -> float | None:
    """The divergence to expect from the sites of a block, each as if it were alone."""
    found = [_priced(site, site.n_units - counts[site.key], outlook) for site in sites]
    known = [kl for kl in found if kl is not None]
    return sum(known) if known else None


def _priced(site: Site, removed: int, outlook: Outlook | None) -> float | None:
    if outlook is None or site.key not in outlook.survey.curves:
        return None
    seen = outlook.survey
    curve = seen.curves[site.key]
    if site.key in outlook.prices:
        return outlook.prices[site.key] * float(curve[removed])
    if site.key in seen.prices:
        return float(damage_of(curve, seen.prices[site.key], [0, removed])[1]) if removed else 0.0
    if site.key in seen.curvatures:
        return seen.curvatures[site.key] * float(curve[removed])
    return None
