"""Parts that keep what was named apart, lm-eval tasks and texts of other kinds: new ones are added to those there."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import Part, Setting

Entry = Mapping[str, Any]
"""A part as `evaluation.json` has it."""


@dataclass(frozen=True, kw_only=True)
class Growing:
    """How a part grows: the field of a `Setting` that names things, where an entry lists them, and how two are joined.

    `join` gives the results of both, the second being newer.
    """

    field: str
    place: tuple[str, ...]
    join: Callable[[Entry, Entry], dict[str, Any]]

    def listed(self, entry: Entry) -> list[Any]:
        """What an entry lists."""
        for name in self.place:
            entry = entry[name]
        return list(entry)

    def relisted(self, entry: Entry, names: list[Any]) -> dict[str, Any]:
        """The entry with another list."""
        if len(self.place) == 1:
            return {**entry, self.place[0]: names}
        outer, inner = self.place
        return {**entry, outer: {**entry[outer], inner: names}}


def rest(part: Part, known: Entry | None, asked: Entry, setting: Setting) -> Setting | None:
    """What is still to be measured of a part; None where all of it is known under the same settings."""
    if known is None:
        return setting
    if part.grows is None or not _alike(part.grows, known, asked):
        return None if _same(known, asked) else setting
    there, field = part.grows.listed(known), part.grows.field
    pairs = zip(getattr(setting, field), part.grows.listed(asked), strict=True)
    new = tuple(name for name, entry in pairs if entry not in there)
    return replace(setting, **{field: new}) if new else None  # type: ignore[arg-type]


def joined(part: Part, known: Entry | None, fresh: Entry, asked: Entry) -> dict[str, Any]:
    """An entry with what another has besides, where both were measured alike."""
    grows = part.grows
    if grows is None or known is None or not _alike(grows, known, asked):
        return dict(fresh)
    results = grows.join(known, fresh)
    names = [name for name in grows.listed(known) if _name(name) not in map(_name, grows.listed(fresh))]
    seconds = round(known.get("seconds", 0) + fresh["seconds"], 1)
    return {**grows.relisted(fresh, [*names, *grows.listed(fresh)]), "results": results, "seconds": seconds}


def join_tasks(known: Entry, fresh: Entry) -> dict[str, Any]:
    """The tasks of both."""
    return {**fresh["results"], "tasks": {**known["results"]["tasks"], **fresh["results"]["tasks"]}}


def join_texts(known: Entry, fresh: Entry) -> dict[str, Any]:
    """The texts of both, a newer one in place of an older one of its name."""
    new = fresh["results"]["others"]
    names = {row["text"] for row in new}
    return {**fresh["results"], "others": [*(r for r in known["results"]["others"] if r["text"] not in names), *new]}


def _same(known: Entry, asked: Entry) -> bool:
    return all(known.get(key) == value for key, value in asked.items())


def _alike(grows: Growing, known: Entry, asked: Entry) -> bool:
    """Whether two entries agree in all but what they list."""
    return _same(grows.relisted(known, []), grows.relisted(asked, []))


def _name(listed: Any) -> str:
    """What is listed by its name."""
    return str(listed["name"] if isinstance(listed, Mapping) else listed)
