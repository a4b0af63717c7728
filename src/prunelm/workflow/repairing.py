"""Repair a model that somebody else has pruned."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..biases import gains_biases
from ..calibration import fingerprint
from ..checkpoint import save
from ..data import read_documents
from ..distributed import is_writer, shared_by
from ..errors import BudgetError, CheckpointError
from ..loading import Source, find_model, load_model, load_tokenizer, stored_dtype
from ..matching import Kept, check_family, check_planned, matched_units, planned_units
from ..memory import within_memory
from ..plan import prunable
from ..progress import Progress, silent
from ..pruning import Report, repair_
from ..recipe import Recipe
from ..sites import bias_of, find_sites
from ..spreading import gathered
from ..stock import stock_config
from ..workbench import lasting, workbench
from ..writing import check_target, writes
from .files import dtype_named
from .texts import calibration_batches, plain


@writes
def repair(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    reconstruction: str = "least-squares",
    ridge: float = 0.1,
    bias: bool | None = None,
    held_out: float = 0.125,
    natural_steps: int = 0,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress = silent,
    **access: Any,
) -> Report:
    """Repair somebody's pruned model: the same units as it has, the kept weights solved again in closed form.

    The units are those that its pruning.json names, or else are found by matching producer rows with the dense model.
    What stays is taken from the dense model; other changes that came with the pruning are not.

    Args:
        dense: the model that was pruned.
        pruned: what was made of it: any folder of a known family with fewer units.
        out: folder to write.
        text, samples, length, seed: of the calibration.
        reconstruction: which repair.
        ridge: how strongly weights are pulled towards the present ones.
        bias: give consumers a bias for the repair to use, where the config can say so; by default where `pruned` has
            biases that `dense` lacks.
        held_out: share of the calibration that judges the repair.
        natural_steps: steps of natural gradient once all is repaired.
        dtype: of the written weights; that of `pruned` by default.
        force, progress, access: see `prune`.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    said: dict[str, Any] = {"reconstruction": reconstruction, "ridge": ridge, "held_out": held_out}
    said |= {"natural_steps": natural_steps, "samples": samples, "length": length, "seed": seed}
    recipe = Recipe.from_dict({"name": "repair", "bias": bool(bias), **said})
    check_target(out, force=force)
    source, other = find_model(dense, **access), find_model(pruned, **access)
    _check_all_channels(other)
    documents = read_documents(text)
    model = load_model(source)
    kept, recipe, notes = _recognized(other, model, recipe, bias)
    tokenizer = load_tokenizer(source)
    written = dtype_named(dtype, "dtype") if dtype else stored_dtype(other)
    task = {"dense": lasting(source.name), "pruned": lasting(other.name), "recipe": recipe.to_dict()}
    task |= {"dtype": str(written), "device": source.where}
    inputs = {"dense": fingerprint(source), "pruned": fingerprint(other)}
    loaded = [model]
    del model
    with workbench(out, task, command="repair", force=force) as bench:

        def repaired(batch_tokens: int) -> tuple[PreTrainedModel, Report]:
            part = bench.part(f"batches-of-{batch_tokens}")
            model = loaded.pop() if loaded else load_model(source)
            options: dict[str, Any] = {"batch_tokens": batch_tokens, "otherwise": _otherwise(model, recipe)}
            calibration, _ = calibration_batches(model, tokenizer, recipe, documents, name=Path(text).name, **options)
            part.check({**inputs, "calibration": plain(calibration.facts)})
            return model, repair_(model, calibration, recipe, kept, notes=notes, bench=part, progress=progress)

        (small, report), again = within_memory(repaired, source.device, length, progress)
        small = gathered(small)
        report.notes.extend([*again, *shared_by()])
        if is_writer():
            save(small, report, out, source=source, tokenizer=tokenizer, dtype=written, force=force)
    return report


def _recognized(
    pruned: Source, dense: PreTrainedModel, recipe: Recipe, bias: bool | None
) -> tuple[Kept, Recipe, list[str]]:
    """The dense model's units that a pruned one has, the recipe with what follows from them, and what to tell of it.

    Raises:
        BudgetError: whole blocks are gone, or nothing is.
        CheckpointError: it cannot be loaded, or is not made of the dense model.
    """
    plan, name = pruned.plan(), Path(pruned.name).name
    if (plan or {}).get("dropped_blocks"):
        raise BudgetError(f"{pruned.name} has lost whole blocks, and no unit of theirs stays that a repair could use.")
    small = load_model(pruned)
    check_family(dense, small)
    planned, how = planned_units(plan, dense), "named in its pruning.json"
    if plan is None or planned is None:
        planned, how = matched_units(dense, small), "found by matching producer rows"
        compared: list[str] = []
    else:
        compared = check_planned(plan, *planned, dense, small)
    kept, unit = planned
    bias, said = _biased(dense, small, recipe, bias, name)
    share, uneven = _gone(dense, kept, unit), not _stock(dense, kept, unit)
    if not share:
        raise BudgetError(f"{pruned.name} has all the units of the dense model: there is nothing to repair.")
    notes = [f"the units are those of {name}, {how}; the recipe's criteria chose nothing", *compared, *said]
    return kept, replace(recipe, sparsity=share, unit=unit, bias=bias, per_block=uneven), notes


def _biased(
    dense: PreTrainedModel, pruned: PreTrainedModel, recipe: Recipe, bias: bool | None, name: str
) -> tuple[bool, list[str]]:
    """Whether consumers get a bias, and what to tell of those that the pruned model has and the dense one lacks."""
    if not gains_biases(dense, pruned):
        return bool(bias), []
    if bias or (bias is None and recipe.reads_pruned):
        return True, [] if bias else [f"{name} has biases that the dense model lacks, so the repair adds them too"]
    return False, [f"the biases that {name} has and the dense model lacks are left out"]


def _otherwise(model: PreTrainedModel, recipe: Recipe) -> str:
    """What else a user whose text is short may ask for: nothing, unless consumers have biases."""
    biased = recipe.bias or any(bias_of(site.consumer.layer) is not None for site in find_sites(model))
    return ", or --reconstruction bias" if biased else ""


def _gone(model: PreTrainedModel, kept: Kept, unit: str) -> float:
    """The share of the dense model's units that is gone."""
    sites = [site for site in find_sites(model, unit) if site.key in kept]
    removed = sum((site.n_units - len(kept[site.key])) * site.cost for site in sites)
    return removed / prunable(find_sites(model))


def _stock(model: PreTrainedModel, kept: Kept, unit: str) -> bool:
    """Whether a stock config can say the widths that are left."""
    everything = find_sites(model, unit)
    sites = [site for site in everything if site.key in kept]
    widths = {(site.name, len(kept[site.key])) for site in sites}
    blocks = {site.block for site in everything}
    even = len(widths) == len({site.name for site in sites}) == len(sites) / len(blocks)
    values = {name: value for site in sites for name, value in site.config_values(len(kept[site.key])).items()}
    return even and stock_config(model.config, values) is not None


def _check_all_channels(pruned: Source) -> None:
    """Raise if a folder says that hidden channels went.

    Raises:
        CheckpointError: with both widths.
    """
    hidden = (pruned.plan() or {}).get("hidden")
    if hidden:
        raise CheckpointError(
            f"{pruned.name} has {len(hidden['kept'])} of {hidden['units']} hidden channels, and only units can be "
            "repaired afterwards: prune the dense model again, with a recipe that repairs"
        )
