"""A plan as a file that people edit: one line for each site; every line that cannot be used is named."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .errors import BudgetError, CheckpointError, PruneLMError
from .forms import check_form
from .job import Job, first_channels_, prepare_
from .plan import Counts, Decided
from .recipe import Recipe
from .registry import did_you_mean
from .sites import Site
from .writing import write_whole

FORMAT = 1
FIELDS = ("format", "model", "recipe", "asked", "sites")
SITE_FIELDS = ("units", "cost", "keep", "kept")
_MODEL = {"family": str, "weights": {str: str}}


def write_plan(path: str | Path, job: Job, recipe: Recipe, model: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Write a plan: the model's fingerprint, the recipe, and how many units stay in each site.

    Raises:
        OutputError: cannot be written.
    """
    lines = [f' "{name}": {json.dumps(value)},' for name, value in (("format", FORMAT), ("model", dict(model)))]
    fields = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in recipe.to_dict().items()]
    lines += [' "recipe": {', ",\n".join(fields), " },"]
    if asked:
        lines.append(f' "asked": {json.dumps(dict(asked))},')
    sites = [f'  "{s.key}": {{"units": {s.n_units}, "cost": {s.cost}, "keep": {job.keeps(s)}}}' for s in job.everything]
    text = "\n".join(["{", *lines, ' "sites": {', ",\n".join(sites), " }", "}", ""])
    write_whole(path, text)


class PlanFile:
    """A plan that was read, with the line of everything in it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.text = self._read()
        self.problems: list[tuple[int, str]] = []
        self.data = self._parsed()
        for name in self.data:
            if name not in FIELDS:
                self._say(name, f"unknown field {name!r}. {did_you_mean(name, FIELDS)}".strip())
        if self.data.get("format") != FORMAT:
            self._say("format", f"format {self.data.get('format')!r} is not known here, this version reads {FORMAT}")
        self.sites = self._section("sites")
        for key, entry in self.sites.items():
            why = _malformed(entry)
            if why:
                self._say(key, f"{key} {why}")
        self.recipe = self._recipe()
        if not isinstance(self.data.get("asked", {}), dict):
            self._say("asked", "'asked' must be an object")

    def _read(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "no text"
            raise CheckpointError(
                f"{self.path}: cannot be read: {why}. Make a plan with prunelm plan MODEL {self.path.name}."
            ) from error

    def _parsed(self) -> dict[str, Any]:
        def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            for name, count in Counter(name for name, _ in pairs).items():
                if count > 1:
                    self._say(name, f"{name!r} is there {count} times", last=True)
            return dict(pairs)

        try:
            data = json.loads(self.text, object_pairs_hook=distinct)
        except json.JSONDecodeError as error:
            raise BudgetError(f"{self.path}: line {error.lineno} is not valid JSON: {error.msg}.") from error
        except RecursionError as error:
            raise BudgetError(f"{self.path}: not valid JSON: nested too deeply.") from error
        except ValueError as error:
            raise BudgetError(f"{self.path}: not valid JSON: a number has too many digits.") from error
        if not isinstance(data, dict):
            raise BudgetError(f"{self.path}: line 1: a plan is a JSON object, this is {type(data).__name__}.")
        return data

    def _section(self, name: str) -> dict[str, Any]:
        found = self.data.get(name)
        if isinstance(found, dict):
            return found
        self._say(name, f"{name!r} must be an object" if name in self.data else f"{name!r} is missing")
        return {}

    def _recipe(self) -> Recipe | None:
        try:
            return Recipe.from_dict(self._section("recipe"), where="recipe")
        except PruneLMError as error:
            named = (
                word for word in re.findall(r"\w+", str(error)) if word != "recipe" and word in self.data["recipe"]
            )
            self._say(next(named, "recipe"), str(error).rstrip("."))
            return None

    def _say(self, name: str, what: str, *, last: bool = False) -> None:
        found = [*re.finditer(rf'^.*?"{re.escape(name)}"\s*:', self.text, re.MULTILINE)]
        place = found[-1 if last else 0].end() if found else 0
        self.problems.append((self.text.count("\n", 0, place) + 1, what))

    def check(self) -> None:
        """Raise if anything in the file cannot be used.

        Raises:
            BudgetError: names every line.
        """
        if self.problems:
            said = "; ".join(f"line {line}: {what}" for line, what in sorted(set(self.problems)))
            lines = len({line for line, _ in self.problems})
            end = "" if said.endswith("?") else "."
            raise BudgetError(f"{self.path}: {lines} line{'s' * (lines > 1)} cannot be used: {said}{end}")

    def check_model(self, fingerprint: Mapping[str, Any]) -> None:
        """Raise unless the plan was made for this very model.

        Raises:
            CheckpointError: says what differs.
        """
        made: Any = self.data.get("model")
        try:
            check_form(made, _MODEL, self.path)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.path}: it does not say which model it is for. Make it again: prunelm plan."
            ) from error
        if made.get("family") != fingerprint["family"]:
            raise CheckpointError(
                f"{self.path}: made for a {made.get('family')} model, but this one is {fingerprint['family']}."
            )
        differ = sorted({name for name, _ in made["weights"].items() ^ fingerprint["weights"].items()})
        if differ:
            raise CheckpointError(
                f"{self.path}: made for other weights or settings ({', '.join(differ[:3])} differ). Plan this model, "
                "or name the one that it was made for."
            )

    def decided(self, model: PreTrainedModel) -> tuple[Recipe, Decided]:
        """The recipe with the sparsity that the plan is, and what stays in each site; sites not named stay whole.

        Args:
            model: the dense model's shapes, which are changed where the recipe changes them beforehand.

        Raises:
            BudgetError: names every line that cannot be used, or says that nothing would go.
        """
        recipe = self.recipe or Recipe(per_block=True)
        if recipe.drops_blocks:
            raise BudgetError(f"{self.path}: recipe {recipe.name!r} drops whole blocks, and a plan is of units.")
        whole = prepare_(model, recipe, narrow_hidden=first_channels_, counts={})
        counts, kept = self._choices(whole)
        if not recipe.per_block:
            self._check_widths(whole, counts)
        self.check()
        removed = sum((site.n_units - counts[site.key]) * site.cost for site in whole.sites)
        gone = removed + whole.narrowed + (whole.outside if recipe.of == "model" else 0)
        if not gone:
            raise BudgetError(f"{self.path}: every site keeps all its units: there is nothing to remove.")
        return replace(recipe, sparsity=gone / whole.budget.asked_of), Decided(counts=counts, kept=kept)

    def _choices(self, job: Job) -> tuple[Counts, dict[str, torch.Tensor]]:
        """Units that stay in each site, and which of them where the file says so; all of them where it is wrong."""
        known = {site.key: site for site in job.everything}
        counts = {key: site.n_units for key, site in known.items()}
        kept = {}
        for key, entry in self.sites.items():
            if key not in known:
                self._say(key, f"this model has no site {key!r}. {did_you_mean(key, known)}".strip())
                continue
            if _malformed(entry):
                continue
            why = _wrong(entry, known[key], job, prunable=any(site.key == key for site in job.sites))
            if why:
                self._say(key, f"{key} {why}")
                continue
            named = entry.get("kept")
            counts[key] = entry["keep"] if named is None else len(named)
            if named is not None:
                kept[key] = torch.tensor(sorted(named), dtype=torch.long)
        return counts, kept

    def _check_widths(self, job: Job, counts: Counts) -> None:
        """Blocks that differ from most others, where a stock config says one number for all."""
        for name in dict.fromkeys(site.name for site in job.everything):
            mine = [site for site in job.everything if site.name == name]
            usual, _ = Counter(counts[site.key] for site in mine).most_common(1)[0]
            for site in mine:
                if counts[site.key] != usual:
                    self._say(
                        site.key,
                        f"{site.key} keeps {counts[site.key]} and others {usual}, but a stock config says one number: "
                        'make them equal, or set "per_block": true in the recipe (opens with trust_remote_code or '
                        "prunelm.load)",
                    )


def _malformed(entry: Any) -> str:
    """What is wrong with a site's entry whatever the model, or nothing."""
    if not isinstance(entry, dict):
        return f'must be an object like {{"keep": 12}}, got {json.dumps(entry)}'
    for name in ("units", "cost", "keep"):
        if name in entry and not _is_whole(entry[name]):
            said = "how many units it keeps" if name == "keep" else f"its {name} as a whole number"
            return f"must say {said}, got {json.dumps(entry[name])}"
    named = entry.get("kept")
    if named is not None and not (isinstance(named, list) and all(map(_is_whole, named))):
        return "must name its kept units as whole numbers"
    return ""


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(entry: Any, site: Site, job: Job, *, prunable: bool) -> str:
    """What is wrong with a site's entry, or nothing."""
    for name in entry:
        if name not in SITE_FIELDS:
            return f"has an unknown field {name!r}. {did_you_mean(name, SITE_FIELDS)}".strip()
    for name, real in (("units", site.n_units), ("cost", site.cost)):
        if entry.get(name, real) != real:
            return f"has {name} {json.dumps(entry[name])}, and the model's is {real}"
    keep, named = entry.get("keep"), entry.get("kept")
    if named is not None:
        why = _wrong_names(named, keep, site)
        if why:
            return why
        keep = len(named)
    return _wrong_number(keep, site, job, prunable)


def _wrong_names(named: Any, keep: Any, site: Site) -> str:
    outside = [unit for unit in named if not 0 <= unit < site.n_units]
    if outside:
        return f"keeps unit {outside[0]}, but its units are 0 to {site.n_units - 1}"
    if len(set(named)) < len(named):
        return f"keeps unit {Counter(named).most_common(1)[0][0]} more than once"
    if keep is not None and keep != len(named):
        return f"keeps {json.dumps(keep)} units and names {len(named)}"
    per = site.n_units // site.strata
    if len({sum(unit // per == run for unit in named) for run in range(site.strata)}) > 1:
        return f"must keep the same number of query heads of each of its {site.strata} KV heads"
    return ""


def _wrong_number(keep: Any, site: Site, job: Job, prunable: bool) -> str:
    if keep is None:
        return "must say how many units it keeps"
    if not 0 <= keep <= site.n_units:
        return f"keeps {keep} of {site.n_units} units"
    if keep == site.n_units and job.budget.legal(site, keep):
        return ""
    if not prunable:
        return f"keeps {keep} of {site.n_units} units, but the recipe leaves this site whole (sites, blocks, per_block)"
    if keep < job.budget.min_units * site.strata:
        return f"keeps {keep} units, at least {job.budget.min_units * site.strata} must stay (min_units)"
    if keep % site.strata:
        return f"keeps {keep} query heads, no multiple of its {site.strata} KV heads"
    if not job.budget.legal(site, keep):
        return f"keeps {keep} units, which no stock config can say to the programs that must open it"
    return ""


def differences(one: PlanFile, other: PlanFile) -> list[dict[str, Any]]:
    """The sites in which two plans differ: units kept in one and in the other, and the parameters between them.

    None stands for a plan that does not name the site, which then stays whole.

    Raises:
        BudgetError: a file is no plan; names every line.
    """
    one.check()
    other.check()
    keys = list(dict.fromkeys([*one.sites, *other.sites]))
    rows = []
    for key in keys:
        first, second = (plan.sites.get(key) for plan in (one, other))
        units, cost = _number("units", first, second), _number("cost", first, second)
        keep = [_kept(first), _kept(second)]
        before, after = (units if k is None else k for k in keep)
        if before != after or _named(first) != _named(second):
            change = (after - before) * cost if before is not None and after is not None and cost is not None else None
            rows.append({"site": key, "units": units, "keep": keep, "parameters": change})
    return rows


def _number(name: str, *entries: Any) -> int | None:
    return next((e[name] for e in entries if isinstance(e, dict) and isinstance(e.get(name), int)), None)


def _named(entry: Any) -> list[int] | None:
    """The units that an entry names, in order."""
    named = entry.get("kept") if isinstance(entry, dict) else None
    return sorted(named) if isinstance(named, list) else None


def _kept(entry: Any) -> int | None:
    if not isinstance(entry, dict):
        return None
    named = entry.get("kept")
    return len(named) if isinstance(named, list) else entry.get("keep")
