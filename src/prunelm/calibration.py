"""A saved calibration: what was seen of a dense model, in a folder that later runs read instead of looking again."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .allocation import Outlook
from .errors import CalibrationError, CheckpointError
from .forms import check_form, damage_answered
from .loading import TOKENIZER_FILES, Source, read_json, sha256_of, weight_files
from .recipe import Recipe
from .search import Found
from .survey import Survey
from .writing import new_folder

FORMAT = 5
FACTS, NUMBERS = "calibration.json", "calibration.safetensors"
_FOUND = {
    "counts": {str: int},
    "step": int,
    "target": int,
    "divergence": float,
    "start": float,
    "tried": int,
    "prices": {str: float},
}
_FORM = {
    "model": {"family": str, "weights": {str: str}},
    "tokenizer": {str: str},
    "recipe": dict,
    "compute_dtype": str,
    "calibration": {"tokens?": int},
    "numbers": str,
    "prices": {str: [[float]]},
    "curvatures": {str: float},
    "search_prices": {str: float},
    "found?": (_FOUND, None),
    "notes": [str],
}
DECIDES = (
    "allocator",
    "per_block",
    "sites",
    "unit",
    "blocks",
    "blocks_from",
    "multiple_of",
    "min_units",
    "attention",
    "ffn",
    "reconstruction",
    "ridge",
    "bias",
    "held_out",
    "price_tokens",
    "repeated",
    "fisher_tokens",
    "candidates",
    "rounds",
    "loss",
    "policy",
    "samples",
    "length",
    "similarity_sequences",
    "similarity_rows",
    "similarity_skip",
    "exclude_sink",
    "covariance_text",
    "seed",
)
"""Recipe fields that decide what is seen; a calibration serves every recipe that agrees in them."""


def fingerprint(source: Source) -> dict[str, Any]:
    """What tells one dense model from another: its family, and the sha256 of every weight file and of its config.

    Raises:
        CheckpointError: there is no weight file.
    """
    family, files = "gguf", weight_files(source)
    if not files:
        raise CheckpointError(
            f"{source.folder}: it has no .safetensors or .bin file, so its weights cannot be told apart"
        )
    if source.gguf is None:
        family, files = str(source.config()["model_type"]), [*files, source.folder / "config.json"]
    return {"family": family, "weights": {file.name: sha256_of(file) for file in files}}


def tokenizer_fingerprint(source: Source) -> dict[str, str]:
    """The sha256 of every file that turns text into tokens; none of a GGUF file, which is one with its weights.

    A saved calibration notes it, and serves another one too: what was seen of the weights stands, whatever tokens mean
    in other texts.
    """
    files = [] if source.gguf is not None else [source.folder / name for name in TOKENIZER_FILES]
    return {file.name: sha256_of(file) for file in files if file.is_file()}


def save_calibration(
    outlook: Outlook,
    out: str | Path,
    *,
    source: Source,
    recipe: Recipe,
    text: Mapping[str, Any],
    compute_dtype: torch.dtype = torch.float32,
    force: bool = False,
) -> None:
    """Write an outlook with its fingerprint to a folder, in one rename.

    Raises:
        CheckpointError: cannot be written.
    """
    seen = outlook.survey
    numbers = {f"scores/{key}": value for key, value in seen.scores.items()}
    numbers |= {f"curves/{key}": value for key, value in seen.curves.items()}
    facts = {
        "format": FORMAT,
        "model": fingerprint(source),
        "tokenizer": tokenizer_fingerprint(source),
        "recipe": recipe.to_dict(),
        "compute_dtype": _named(compute_dtype),
        "calibration": dict(text),
        "prices": seen.prices,
        "curvatures": seen.curvatures,
        "search_prices": outlook.prices,
        "found": None if outlook.chosen is None else asdict(outlook.chosen),
        "notes": outlook.notes,
    }
    with new_folder(out, force=force) as folder:
        save_file({name: value.contiguous() for name, value in numbers.items()}, folder / NUMBERS)
        facts["numbers"] = sha256_of(folder / NUMBERS)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def load_calibration(
    path: str | Path, *, source: Source, recipe: Recipe, compute_dtype: torch.dtype | None = None
) -> Outlook:
    """What `save_calibration` wrote, for this very model and a recipe that would have seen the same.

    With `compute_dtype`, the model must have been computed in it.

    Raises:
        CalibrationError: no such folder, numbers damaged, or made from another model or recipe; says what differs.
        CheckpointError: the facts are damaged; says where.
    """
    folder = Path(path)
    facts = _facts_of(folder)
    _same_model(folder, facts["model"], fingerprint(source))
    mine = recipe.to_dict()
    for name in DECIDES:
        if facts["recipe"].get(name) != mine[name]:
            raise CalibrationError(
                f"{folder}: made with {name} = {facts['recipe'].get(name)!r}, but the recipe says {mine[name]!r}. "
                "Calibrate again, or use the same recipe."
            )
    if compute_dtype is not None and facts["compute_dtype"] != _named(compute_dtype):
        raise CalibrationError(
            f"{folder}: made with compute_dtype = {facts['compute_dtype']!r}, but this run says "
            f"{_named(compute_dtype)!r}. Say --compute-dtype {facts['compute_dtype']}, or calibrate again."
        )
    if sha256_of(folder / NUMBERS) != facts["numbers"]:
        raise CalibrationError(f"{folder / NUMBERS}: damaged or cut short (another sha256). Calibrate again.")
    scores: dict[str, torch.Tensor] = {}
    curves: dict[str, torch.Tensor] = {}
    try:
        with safe_open(folder / NUMBERS, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                kind, key = name.split("/")
                {"scores": scores, "curves": curves}[kind][key] = opened.get_tensor(name)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CalibrationError(f"{folder / NUMBERS}: damaged or cut short ({error}). Calibrate again.") from error
    if not all(bool(torch.isfinite(value).all()) for value in (*scores.values(), *curves.values())):
        raise CalibrationError(f"{folder / NUMBERS}: holds numbers that are not finite. Calibrate again.")
    found = {name: value for name, value in (facts.get("found") or {}).items() if name in _FOUND}
    with damage_answered(folder / FACTS):
        prices = {key: [(int(o), float(kl)) for o, kl in points] for key, points in facts["prices"].items()}
    text = facts["calibration"]
    note = f"what was seen of the dense model comes from {folder.name} ({text.get('tokens', 0):,} tokens)"
    note += _other_tokenizer(facts["tokenizer"], tokenizer_fingerprint(source))
    return Outlook(
        survey=Survey(scores=scores, curves=curves, prices=prices, curvatures=facts["curvatures"]),
        prices=facts["search_prices"],
        chosen=Found(**found) if found else None,
        notes=[note, *facts["notes"]],
    )


def calibrated_recipe(path: str | Path, **overrides: Any) -> Recipe:
    """The recipe that a saved calibration was made with, with some values replaced as by `Recipe.load`.

    Raises:
        CalibrationError: no such folder, or of another format.
        CheckpointError: the facts are damaged; says where.
        RecipeError: a value is bad.
    """
    folder = Path(path)
    facts = _facts_of(folder)
    with damage_answered(folder / FACTS):
        return Recipe.from_dict(facts["recipe"], str(folder / FACTS), **overrides)


def _facts_of(folder: Path) -> dict[str, Any]:
    """What a saved calibration says besides its numbers.

    Raises:
        CalibrationError: no such folder, or of another format.
        CheckpointError: damaged; says where.
    """
    if not (folder / FACTS).is_file() or not (folder / NUMBERS).is_file():
        raise CalibrationError(f"{folder}: no saved calibration; make one with prunelm calibrate")
    facts = read_json(folder / FACTS)
    if facts.get("format") != FORMAT:
        raise CalibrationError(f"{folder}: format {facts.get('format')!r} is not known here. Calibrate again.")
    check_form(facts, _FORM, folder / FACTS)
    return facts


def calibration_digest(path: str | Path) -> str:
    """The sha256 of the numbers and facts of a saved calibration."""
    digest = hashlib.sha256()
    for name in (FACTS, NUMBERS):
        digest.update((Path(path) / name).read_bytes())
    return digest.hexdigest()


def _named(dtype: torch.dtype) -> str:
    """A data type, as the command line names it."""
    return str(dtype).removeprefix("torch.")


def _other_tokenizer(made: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What to know where tokens had another meaning."""
    differ = sorted({name for name, _ in set(made.items()) ^ set(now.items())})
    return f", read by another tokenizer ({', '.join(differ[:3])} differ)" if differ else ""


def _same_model(folder: Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if made["family"] != now["family"]:
        raise CalibrationError(f"{folder}: made from a {made['family']} model, but this one is {now['family']}")
    if made["weights"] != now["weights"]:
        ours, theirs = set(now["weights"].items()), set(made["weights"].items())
        differ = sorted({name for name, _ in ours ^ theirs})
        raise CalibrationError(
            f"{folder}: made from other weights or settings ({', '.join(differ[:3])} differ). Calibrate this model, or "
            "name the one it was made from."
        )
