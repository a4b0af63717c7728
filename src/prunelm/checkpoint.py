"""Write a pruned model as a Hugging Face folder, and prove that it opens before saying done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .card import LICENSE, metadata, model_card
from .curves import FILE as CURVES
from .errors import CheckpointError
from .hidden import built_config, built_width
from .loading import FORMAT, PLAN_FILE, TOKENIZER_FILES, Source, read_json, widths
from .per_block import carries_code, modeling_file, stored_names
from .placement import CPU, memory_words
from .pressing import Pressing
from .pruning import Report
from .results import versions
from .sites import architecture_of, find_sites, gone_sites
from .stock import stock_config, why_relabeled
from .stream import prediction
from .targets import readers_of
from .tasks import PIPELINES, task_of
from .verify import PROOF_TOKENS, TOLERANCE, proof_inputs
from .writing import new_folder

CARD = "README.md"


def save(
    model: PreTrainedModel,
    report: Report,
    out: str | Path,
    *,
    source: Source | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
    prove: bool = True,
    pressing: Pressing | None = None,
) -> dict[str, Any]:
    """What `pruning.json` says, after writing the pruned model to `out` and loading it again in a fresh process.

    Args:
        model: pruned in place by `prune_`.
        report: what `prune_` returned.
        out: folder to write; made in one rename at the end.
        source: where the dense model came from; its tokenizer files are copied byte for byte.
        tokenizer: saved where the source has no tokenizer files (GGUF).
        dtype: of the written weights; the model's own by default.
        force: replace an existing folder.
        prove: compare the logits of a fresh process with the model in memory.
        pressing: has written the blocks already, where the model was never whole.

    Raises:
        CheckpointError: cannot be written, or the written folder does not give the same logits.
    """
    _cast_(model, dtype or model.dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != "meta")
    with new_folder(out, force=force, need_bytes=size) as folder:
        config, zeros = _stock_config(model, report)
        facts = describe(model, report, source, "transformers" if config is not None else "prunelm")
        if config is not None:
            facts["notes"] = list(dict.fromkeys([*facts["notes"], *_said_of(model, report, config, zeros)]))
        _write_weights(model, config, folder, zeros, pressing)
        _write_config(model, config, folder)
        copy_tokenizer(source, tokenizer, folder)
        (folder / PLAN_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if report.curves.get("sites"):
            (folder / CURVES).write_text(json.dumps(report.curves) + "\n", encoding="utf-8")
        head = metadata(source.folder / CARD, LICENSE) if source is not None else []
        head.append(f"pipeline_tag: {PIPELINES[task_of(model)]}")
        (folder / CARD).write_text(model_card(facts, head=head), encoding="utf-8")
        if prove:
            prove_folder(model, folder, pressing)
    return facts


def _cast_(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of the weights; buffers, such as rotary frequencies, are not stored and keep their precision."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def describe(model: PreTrainedModel, report: Report, source: Source | None, loader: str) -> dict[str, Any]:
    """The content of `pruning.json`: everything that decided the result, and nothing that changes between runs."""
    return {
        "format": FORMAT,
        "loader": loader,
        "modeling_file": loader == "prunelm" and carries_code(model),
        "base_model": _base_name(source, model),
        "recipe": report.recipe.to_dict(),
        **({"asked": report.asked} if report.asked else {}),
        "parameters": {
            "before": report.parameters_before,
            "after": report.parameters_after,
            "prunable": report.prunable,
            "share_of_blocks": round(report.sparsity_of_blocks, 6),
            "share_of_model": round(report.sparsity_of_model, 6),
        },
        "sites": {key: {**entry, "kept": report.plan.kept[key].tolist()} for key, entry in report.sites.items()},
        **({"dropped_blocks": report.dropped_blocks} if report.dropped_blocks else {}),
        **({"hidden": report.hidden} if report.hidden else {}),
        "widths": widths(model),
        "calibration": report.calibration,
        "notes": report.notes,
        "device": report.device,
        **({"compute_dtype": report.compute_dtype} if report.compute_dtype != "float32" else {}),
        **report.dtypes,
        "versions": versions(),
    }


def _base_name(source: Source | None, model: PreTrainedModel) -> str:
    if source is None:
        return str(model.config.model_type)
    if source.gguf is not None:
        return source.gguf
    return source.name if not Path(source.name).exists() else Path(source.name).resolve().name


def _stock_config(model: PreTrainedModel, report: Report) -> tuple[PreTrainedConfig | None, dict[str, Tensor]]:
    """A config under which plain transformers builds exactly these shapes, or None, and zeros for further biases."""
    foreign = built_width(model) is not None and not architecture_of(model.config).hidden_stock
    config = None
    if not report.recipe.per_block and not foreign:
        config = stock_config(model.config, {}, readers_of(report.recipe.targets))
    if config is None:
        return None, {}
    config.architectures = [class_for(model, config)]
    with torch.device("meta"):
        skeleton = getattr(transformers, config.architectures[0])(config)
    own = {name: p.shape for name, p in model.named_parameters()}
    built = {name: p.shape for name, p in skeleton.named_parameters()}
    further = {name: shape for name, shape in built.items() if name not in own and name.endswith(".bias")}
    if config.model_type == model.config.model_type:
        further = {}
    zeros = {name: torch.zeros(shape, dtype=model.dtype) for name, shape in further.items()}
    return (config, zeros) if {**own, **further} == built else (None, {})


def _said_of(
    model: PreTrainedModel, report: Report, config: PreTrainedConfig, zeros: Mapping[str, Tensor]
) -> Iterator[str]:
    """What a user must know of a folder under another model type."""
    why = why_relabeled(model.config, config, readers_of(report.recipe.targets))
    if why is not None:
        yield why
    if zeros:
        count = sum(zero.numel() for zero in zeros.values())
        yield f"{count:,} biases of zero were written beside the {report.parameters_after:,} parameters: " + (
            f"{config.model_type} has them and {model.config.model_type} has not"
        )


def class_for(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """The name of the model's class in the words of another config."""
    old, new = (type(c).__name__.removesuffix("Config") for c in (model.config, config))
    return type(model).__name__.replace(old, new, 1)


def _write_weights(
    model: PreTrainedModel,
    config: PreTrainedConfig | None,
    folder: Path,
    zeros: Mapping[str, Tensor],
    pressing: Pressing | None,
) -> None:
    own = model.config
    try:
        model.config = config or built_config(model)
        if pressing is not None:
            pressing.write(folder, zeros)
        else:
            model.save_pretrained(folder, state_dict={**model.state_dict(), **zeros} if zeros else None)
    finally:
        model.config = own


def _write_config(model: PreTrainedModel, config: PreTrainedConfig | None, folder: Path) -> None:
    """Complete config.json with every key that some reader needs, in the forms old and new readers know."""
    raw = read_json(folder / "config.json")
    raw["architectures"] = [class_for(model, config or model.config)]
    raw.pop("_name_or_path", None)
    raw["torch_dtype"] = raw["dtype"] = str(model.dtype).removeprefix("torch.")
    raw |= legacy_rope(raw, architecture_of(model.config).legacy_rope)
    if config is not None and hasattr(config, "sliding_window"):
        raw["sliding_window"] = config.sliding_window
    if config is None:
        raw |= {"per_layer_config": per_layer_config(model), **stored_names(model)}
    if config is None and carries_code(model):
        name, text = modeling_file(model)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def legacy_rope(raw: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The keys by which readers older than `rope_parameters` know rotary embeddings; they ignore the new one."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if "full_attention" in rope:
        local = (rope.get("sliding_attention") or {}).get("rope_theta")
        inner = legacy_rope({"rope_parameters": rope["full_attention"]}, names)
        return {**inner, **({"rope_local_base_freq": local} if local is not None else {})}
    plain = rope.get("rope_type", "default") == "default"
    apart = ("rope_theta", "partial_rotary_factor")
    scaling = None if plain else {k: v for k, v in rope.items() if k not in apart}
    found = {"rope_scaling": scaling}
    for key in apart:
        if key in rope:
            found[names.get(key, key)] = rope[key]
    return found


def per_layer_config(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """The widths of each block that differ from the config's, under the names of config fields."""
    layers: dict[str, dict[str, int]] = {}
    for site in find_sites(model):
        for name, value in site.config_values(site.n_units).items():
            if getattr(model.config, name, None) != value and name != "head_dim":
                layers.setdefault(str(site.block), {})[name] = value
    for key, spec in gone_sites(model).items():
        layers.setdefault(key.split(".")[0], {}).update(dict.fromkeys(spec.config_fields, 0))
    return layers


def copy_tokenizer(source: Source | None, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Put the tokenizer files of the source into a folder, or else the tokenizer."""
    copied = False
    if source is not None and source.gguf is None:
        for name in TOKENIZER_FILES:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, folder / name)
                copied = copied or name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece"))
    if tokenizer is not None and not copied:
        tokenizer.save_pretrained(folder)


@torch.no_grad()
def prove_folder(model: PreTrainedModel, folder: Path, pressing: Pressing | None = None) -> float:
    """The largest difference of logits between a fresh process that loads the folder and the model in memory.

    A model that was never whole is not loaded whole there either: its blocks are read one by one, by the shapes that
    the folder's classes build.

    Raises:
        CheckpointError: it does not load there, or differs.
    """
    ids = proof_inputs(model.config.vocab_size, PROOF_TOKENS)
    expected = _logits(model, ids) if pressing is None else pressing.logits()
    if not bool(torch.isfinite(expected).all()):
        raise CheckpointError("the pruned model's logits are not finite; nothing was written. Try --dtype float32.")
    with tempfile.TemporaryDirectory(prefix=".proof-", dir=folder) as scratch:
        target = Path(scratch) / "expected.safetensors"
        save_file({"ids": ids, "logits": expected.contiguous()}, target)
        run = verified(str(folder), str(target), *(["streamed"] if pressing else []), modules=scratch)
    if run.returncode != 0:
        raise CheckpointError(f"the written folder did not prove itself in a fresh process: {_end_of(run)}")
    gap = float(run.stdout.strip().splitlines()[-1])
    if not gap <= TOLERANCE:
        raise CheckpointError(f"the written folder gives other logits (difference {gap:.2e}); nothing was kept")
    return gap


def _end_of(run: subprocess.CompletedProcess[str]) -> str:
    """Why a process ended: the signal that ended it, or its last words."""
    if run.returncode < 0:
        number = -run.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        why = f", as the system does where memory runs out ({memory_words(CPU)})" if name == "SIGKILL" else ""
        return f"{name} ended it{why}"
    return (run.stderr.strip().splitlines() or ["no message"])[-1][:300]


def verified(*words: str, modules: str) -> subprocess.CompletedProcess[str]:
    """What `python -m prunelm.verify` says in a fresh process that keeps the code of folders in `modules`."""
    environment = {**os.environ, "HF_MODULES_CACHE": modules}
    command = [sys.executable, "-m", "prunelm.verify", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def _logits(model: PreTrainedModel, ids: Int[Tensor, "1 token"]) -> Tensor:
    """What a model makes of some tokens in float32, whatever the dtype of its weights."""
    own = model.dtype
    _cast_(model, torch.float32)
    expected = prediction(model(input_ids=ids))
    _cast_(model, own)
    return expected
