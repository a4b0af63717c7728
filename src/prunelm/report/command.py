"""The commands that make a folder and its evaluation again: from its resolved recipe, checked to give that very one."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..errors import PruneLMError
from ..perplexity_limit import LAST_TENTH
from ..recipe import Recipe
from ..suite import Setting

FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in ("allocator", "reconstruction", "ridge", "held_out", "unit")},
    **{name: f"--{name.replace('_', '-')}" for name in ("attention_share", "blocks", "of", "multiple_of", "hidden")},
    **{name: f"--{name.replace('_', '-')}" for name in ("loss", "samples", "length", "seed", "tensor_parallel")},
    "natural_steps": "--natural-steps",
    "targets": "--for",
    "sites": "--sites",
}
"""Fields of a recipe that have an option of `prunelm prune`, with a value."""
SWITCHES = {"bias": ("--bias", "--no-bias"), "gradient_checkpointing": ("--gradient-checkpointing", "")}
SAVED = "recipe.toml"
LIMITS = ("params", "fit", "max_ppl", "speedup")
"""Budgets in other units, by their names in pruning.json, as options have them."""
REPAIR = "repair"
"""The name of the recipe that `prunelm repair` makes of its options."""
REPAIRED = {
    **{"reconstruction": "least-squares", "ridge": 0.1, "bias": False, "held_out": 0.125, "natural_steps": 0},
    **{"samples": 128, "length": 512, "seed": 0},
}
"""Fields that have an option of `prunelm repair`, and their values where none is said."""
STREAMED = ("scratch_dtype", "statistics_dtype")
"""Data types of what a streamed run keeps."""


def command(pruning: Mapping[str, Any]) -> tuple[str, bool]:
    """The command, and whether it reads a file `recipe.toml` because options cannot say the recipe."""
    recipe = {**Recipe().to_dict(), **pruning["recipe"]}  # an older version may not have known every field
    if recipe["name"] == REPAIR:
        return _repair(pruning, recipe), False
    words = ["prunelm", "prune", shlex.quote(pruning["base_model"]), "OUT"]
    generated = recipe["calibration"] == "self-generated"
    text = ["--self-generated"] if generated else _text(pruning)
    text += _dtypes(pruning)
    asked = pruning.get("asked", {})
    seen = ["--calibrated", shlex.quote(asked["calibrated"])] if "calibrated" in asked else []
    if "plan" in asked or seen:  # these hold their recipe
        size = ["--plan", shlex.quote(asked["plan"])] if "plan" in asked else _size(recipe, asked)
        return " ".join([*words, *size, *seen, *(word for word in text if word != "--self-generated")]), False
    options = _options(recipe)
    named = [*_size(recipe, asked), "--recipe"]
    if options is None:
        return " ".join([*words, *named, SAVED, *text]), True
    return " ".join([*words, *named, shlex.quote(recipe["name"]), *text, *options]), False


def _text(pruning: Mapping[str, Any]) -> list[str]:
    """The text that was read, if any was."""
    source = pruning["calibration"]["criterion"].get("source", "")
    return ["--text", shlex.quote(source)] if source and source != "none needed" else []


def _repair(pruning: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """The command that repairs somebody's pruned model, which a folder does not name."""
    options = {name: recipe[name] for name, usual in REPAIRED.items() if recipe[name] != usual}
    words = ["prunelm", "repair", shlex.quote(pruning["base_model"]), "PRUNED", "OUT", *_text(pruning)]
    return " ".join([*words, *_said(options)])


def transferred(pruning: Mapping[str, Any]) -> list[str]:
    """Options of `prunelm transfer` that take the recipe of a pruned model."""
    recipe = {**Recipe().to_dict(), **pruning["recipe"]}
    words = ["--recipe", SAVED, "--sparsity", f"{recipe['sparsity']:g}"]
    try:
        before = Recipe.load(recipe["name"], sparsity=recipe["sparsity"]).to_dict()
    except PruneLMError:
        return words
    said = {"samples": "--samples", "length": "--calibration-length", "seed": "--seed"}
    changes = {name: recipe[name] for name in said if recipe[name] != before[name]}
    if {**before, **changes} != recipe:
        return words
    words[1] = shlex.quote(recipe["name"])
    return [*words, *(word for name, value in changes.items() for word in (said[name], str(value)))]


def _dtypes(pruning: Mapping[str, Any]) -> Iterator[str]:
    """Data types other than the usual; those of a streamed run belong to `--stream`."""
    if any(name in pruning for name in STREAMED):
        yield "--stream"
    for name in ("dtype", "compute_dtype", *STREAMED):
        if name in pruning:
            yield f"--{name.replace('_', '-')}"
            yield pruning[name]


def _size(recipe: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The budget as it was said: in other units where there are some, which found the recipe's sparsity."""
    limit = next((name for name in LIMITS if name in asked), None)
    if "sparsities" in asked:
        return ["--sparsity", ",".join(map(repr, asked["sparsities"]))]
    if limit is None:
        return ["--sparsity", repr(recipe["sparsity"])]
    words = [f"--{limit.replace('_', '-')}", shlex.quote(asked[limit])]
    if limit == "max_ppl" and not asked["text"].startswith(LAST_TENTH):
        words += ["--held-out-text", shlex.quote(asked["text"])]
    return words


def _options(recipe: Mapping[str, Any]) -> list[str] | None:
    """Options that turn the recipe of this name into this one; None where there are none."""
    try:
        plain = Recipe.load(recipe["name"], sparsity=recipe["sparsity"])
    except PruneLMError:
        return None
    for words, start in _starts(recipe, plain):
        before = start.to_dict()
        changes = {name: recipe[name] for name in (*FLAGS, *SWITCHES) if recipe[name] != before[name]}
        if {**before, **changes} == dict(recipe):
            return [*words, *_said(changes)]
    return None


def _starts(recipe: Mapping[str, Any], plain: Recipe) -> Iterator[tuple[list[str], Recipe]]:
    """Recipes to begin with: the named one, with one criterion everywhere, with or without uneven blocks."""
    fields: dict[str, Any] = {"sparsity": recipe["sparsity"]}
    scoring, words = recipe["attention"], list[str]()
    if scoring == recipe["ffn"] and list(scoring) == ["criterion"] and scoring != plain.to_dict()["attention"]:
        fields |= {"criterion": scoring["criterion"]}
        words += ["--criterion", scoring["criterion"]]
    for more, extra in ((list[str](), {}), (["--per-block"], {"per_block": True})):
        try:
            start = Recipe.load(recipe["name"], **fields, **extra)
            yield [*words, *more], start
            yield [*words, *more, "--uniform"], start.evened()
        except PruneLMError:
            continue


def _said(changes: Mapping[str, Any]) -> Iterator[str]:
    for name, value in changes.items():
        if name in SWITCHES:
            yield SWITCHES[name][0 if value else 1]
        else:
            yield FLAGS[name]
            yield ",".join(value) if isinstance(value, list | tuple) else str(value)


SIZES = (
    *("length", "max_tokens", "batch_size", "seed", "prompts", "new_tokens", "rounds", "pseudo_tokens"),
    *("include_path", "limit", "tasks"),
)
"""Settings of an evaluation that have an option of `prunelm evaluate`."""


def evaluations(evaluation: Mapping[str, Any], name: str, base: str) -> list[str]:
    """The commands that measure what an evaluation has: one for all parts of one text that agree in their settings."""
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for part, entry in evaluation["parts"].items():
        if not entry["settings"] or entry.get("compared"):
            continue
        asked = {key: value for key, value in entry["settings"].items() if key in SIZES}
        asked |= {"text": entry["text"]} if "text" in entry else {}
        asked |= {"others": [other["name"] for other in entry["others"]]} if "others" in entry else {}
        for known, parts in groups:
            if all(known.get(key, value) == value for key, value in asked.items()):
                known |= asked
                parts.append(part)
                break
        else:
            groups.append((asked, [part]))
    return [_evaluation(asked, parts, name, base if evaluation.get("against") else None) for asked, parts in groups]


def _evaluation(asked: Mapping[str, Any], parts: Sequence[str], name: str, base: str | None) -> str:
    """One command of an evaluation."""
    text = asked["text"]["name"] if "text" in asked else "ANY_TEXT"
    words = ["prunelm", "evaluate", shlex.quote(name), "--text", shlex.quote(text)]
    words += ["--against", shlex.quote(base)] if base is not None else []
    words += ["--parts", ",".join(parts)]
    unsaid = Setting()
    for key in ("others", *SIZES):
        value = asked.get(key, getattr(unsaid, key))
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(unsaid, key):
            listed = ",".join(value) if isinstance(value, tuple) else str(value)
            words += [f"--{key.replace('_', '-')}", shlex.quote(listed)]
    return " ".join([*words, "--out", shlex.quote(f"{name}/evaluation.json")])


def as_toml(recipe: Mapping[str, Any]) -> str:
    """A resolved recipe as a file that `--recipe` reads."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in recipe.items() if _plain(value) and name != "name"]
    for name, table in recipe.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items() if _plain(value)]
    return "\n".join(lines)


def _plain(value: Any) -> bool:
    return value is not None and not isinstance(value, Mapping)
