"""Repair a model that somebody else has pruned."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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
from ..sites import find_sites
from ..spreading import gathered
from ..stock import stock_config
from ..workbench import workbench
from ..writing import check_target, writes
from .files import dtype_named, lasting
from .texts import calibration_batches, plain


@writes
def repair(
    dense: str | Path,
    pruned: str | Path,
    out: str | Path,
    *,
    text: str | Path,
    reconstruction: str = "least-squares",
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
        natural_steps: steps of natural gradient once all is repaired.
        dtype: of the written weights; that of `pruned` by default.
        force, progress, access: see `prune`.

    Raises:
        PruneLMError: one line that says what to do; nothing was written.
    """
    check_target(out, force=force)
    source, other = find_model(dense, **access), find_model(pruned, **access)
    _check_all_channels(other)
    documents = read_documents(text)
    model = load_model(source)
    kept, unit, how = _units_of(other, model)
    gone = _gone(model, kept, unit)
    if not gone:
        raise BudgetError(f"{other.name} has all the units of {source.name}: there is nothing to repair.")
    said = {"name": "repair", "unit": unit, "reconstruction": reconstruction, "ridge": 0.1, "held_out": 0.125}
    said |= {"sparsity": gone, "per_block": not _stock(model, kept, unit)}
    said |= {"natural_steps": natural_steps, "samples": samples, "length": length, "seed": seed}
    recipe = Recipe.from_dict(said)
    tokenizer = load_tokenizer(source)
    notes = [f"the units are those of {Path(other.name).name}, {how[0]}; the recipe's criteria chose nothing"]
    notes += how[1:]
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
            options: dict[str, Any] = {"name": Path(text).name, "batch_tokens": batch_tokens}
            calibration, _ = calibration_batches(model, tokenizer, recipe, documents, **options)
            part.check({**inputs, "calibration": plain(calibration.facts)})
            return model, repair_(model, calibration, recipe, kept, notes=notes, bench=part, progress=progress)

        (small, report), again = within_memory(repaired, source.device, length, progress)
        small = gathered(small)
        report.notes.extend([*again, *shared_by()])
        if is_writer():
            save(small, report, out, source=source, tokenizer=tokenizer, dtype=written, force=force)
    return report


def _units_of(pruned: Source, dense: PreTrainedModel) -> tuple[Kept, str, list[str]]:
    """The dense model's units that a pruned one has, which kind of units they are, and what is known of them how.

    Raises:
        BudgetError: whole blocks are gone.
        CheckpointError: it cannot be loaded, or is not made of the dense model.
    """
    plan = pruned.plan()
    if (plan or {}).get("dropped_blocks"):
        raise BudgetError(f"{pruned.name} has lost whole blocks, and no unit of theirs stays that a repair could use.")
    small = load_model(pruned)
    check_family(dense, small)
    planned = planned_units(plan, dense)
    if plan is None or planned is None:
        return *matched_units(dense, small), ["found by matching producer rows"]
    return *planned, ["named in its pruning.json", *check_planned(plan, *planned, dense, small)]


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
