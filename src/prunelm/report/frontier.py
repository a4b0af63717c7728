"""Quality against size: which models were measured alike, and a figure of each such group."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from . import figures
from .gathering import Gathered
from .overview import measured_on, short_names

_SURER = (
    "Lines: standard errors over windows of text. All of these models read the same windows, so that differences "
    "between them are surer than these lines."
)


def frontiers(found: Sequence[Gathered]) -> Iterator[tuple[str, figures.Spec, str]]:
    """A figure of each group of at least two models of different sizes that were measured alike."""
    groups, short = measured_alike(found), short_names(found)
    for group in groups:
        if not _drawn(group):
            continue
        metric = _quality(group[0])["metric"]
        title = f"Quality against size: {metric}"
        yield (
            title if len(groups) == 1 else f"{title} on {measured_on(group[0])}",
            figures.frontier(_rows(group, short), metric),
            _SURER,
        )


def not_drawn(found: Sequence[Gathered]) -> list[str]:
    """Why models are missing from the figures of quality against size."""
    groups, short = measured_alike(found), short_names(found)
    if not groups:
        return ["Quality against size is drawn once part quality has been measured for at least two sizes."]
    apart = [one for group in groups if not _drawn(group) for one in group]
    if not apart:
        return []
    said = "; ".join(f"{short[one.name]} on {measured_on(one)}" for one in apart)
    return [f"Quality against size is drawn for models of different sizes that were measured alike, not for {said}."]


def measured_alike(found: Sequence[Gathered]) -> list[list[Gathered]]:
    """The models with measured quality, grouped by the windows that they read, and by the dense model beside them."""
    groups: dict[Hashable, list[Gathered]] = {}
    for one in found:
        if "value" in (one.part("quality") or {}):
            groups.setdefault(_alike(one), []).append(one)
    return list(groups.values())


def _alike(one: Gathered) -> Hashable:
    """What must be the same for two numbers to be compared."""
    quality, evaluation = _quality(one), one.evaluation or {}
    facts, settings = quality.get("facts", {}), evaluation["parts"]["quality"]["settings"]
    dense = evaluation.get("against") or {}
    read = (facts.get("sha256"), facts.get("length", settings.get("length")), facts.get("seed"))
    return (*read, settings.get("dtype"), quality["metric"], dense.get("weights"))


def _quality(one: Gathered) -> Mapping[str, Any]:
    return one.part("quality") or {}


def _drawn(group: Sequence[Gathered]) -> bool:
    return len({one.pruning["parameters"]["after"] for one in group}) > 1


def _rows(group: Sequence[Gathered], short: Mapping[str, str]) -> list[dict[str, Any]]:
    """A point per model, and one of the dense model where it was measured."""
    rows = []
    for one in group:
        quality, size = _quality(one), one.pruning["parameters"]
        rows.append(_row(one.name, short[one.name], size["after"], quality))
        if "dense" in quality and not any(row["model"] == "dense" for row in rows):
            rows.append(_row("dense", "dense", size["before"], quality["dense"]))
    return rows


def _row(model: str, label: str, parameters: int, measured: Mapping[str, Any]) -> dict[str, Any]:
    value, error = measured["value"], measured.get("error")
    ends = {"low": None, "high": None} if error is None else {"low": value - error, "high": value + error}
    return {"model": model, "label": label, "parameters": parameters, "value": value, **ends}
