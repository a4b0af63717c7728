"""Put back what another program dropped from a folder's config when it saved the folder again."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from .checkpoint import legacy_rope, per_layer_config
from .errors import CheckpointError
from .loading import PLAN_FILE, Source, find_model, read_json, skeleton
from .per_block import carries_code, modeling_file, stored_names
from .sites import architecture_of
from .writing import write_whole

_NOT_SETTINGS = ("architectures", "auto_map", "dtype", "model_type", "per_layer_config", "torch_dtype")


def finalize(folder: str | Path, *, like: str | Path | None = None) -> list[str]:
    """What was put back into a folder that another program saved again; nothing when nothing was missing.

    Legacy rotary keys and both names of the dtype are written anew from the config. Per-block folders get their table
    of widths, the names of their classes and the modeling file back, from pruning.json.

    Args:
        folder: of the model, as the other program left it; changed in place.
        like: the folder that the other program read: pruning.json and settings that are missing are taken from it.

    Raises:
        CheckpointError: no model folder, or weights of other sizes than pruning.json says.
        OutputError: it cannot be written.
    """
    _refuse_adapter(Path(folder))
    source = find_model(folder)
    if source.gguf is not None:
        raise CheckpointError(f"{folder}: a GGUF file lacks nothing that this command puts back. Give a folder.")
    raw = read_json(source.folder / "config.json")
    wanted, files, plan = dict(raw), dict[str, str](), None
    if like is not None:
        original = find_model(like)
        settings = read_json(original.folder / "config.json")
        wanted |= {k: v for k, v in settings.items() if k not in raw and k not in _NOT_SETTINGS}
        _same_family(source, original)
        if not (source.folder / PLAN_FILE).is_file() and (original.folder / PLAN_FILE).is_file():
            plan = original.plan()
            files[PLAN_FILE] = (original.folder / PLAN_FILE).read_text(encoding="utf-8")
    plan = plan or source.plan()
    model = skeleton(source, plan, fitting=False)
    _check_shapes(source, model)
    wanted |= legacy_rope(wanted, architecture_of(model.config).legacy_rope)
    dtype = raw.get("dtype") or raw.get("torch_dtype") or _stored_dtype(source.folder)
    wanted |= {"dtype": dtype, "torch_dtype": dtype}
    if plan is not None and plan.get("loader") == "prunelm":
        wanted |= {"per_layer_config": per_layer_config(model), **stored_names(model)}
        if carries_code(model):
            name, text = modeling_file(model)
            files[name] = text
    files["config.json"] = json.dumps(wanted, indent=2, sort_keys=True) + "\n"
    said = [name for name, text in files.items() if name != "config.json" and _other(source.folder / name, text)]
    changed = [key for key in sorted(wanted) if key not in raw or raw[key] != wanted[key]]
    if changed or said:
        _write(source.folder, files)
    return said + changed


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file() and not list(folder.glob("model*.safetensors")):
        raise CheckpointError(f"{folder}: it holds an adapter only. Merge it (merge_and_unload) and save that first.")


def _same_family(source: Source, original: Source) -> None:
    here, there = source.config()["model_type"], original.config()["model_type"]
    if here != there:
        raise CheckpointError(
            f"{original.name}: a {there} model, but {source.name} is {here}. Give what it was made of."
        )


def _check_shapes(source: Source, model: PreTrainedModel) -> None:
    """Raise unless the stored weights have the sizes that config and pruning.json say."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for file in sorted(source.folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                found = tuple(opened.get_slice(name).get_shape())
                if shapes.get(name, found) != found:
                    raise CheckpointError(
                        f"{source.name}: {name} is {found}, but its config and pruning.json make it {shapes[name]}. "
                        "Name the folder that it was made of with --like."
                    )


def _stored_dtype(folder: Path) -> str:
    with safe_open(sorted(folder.glob("*.safetensors"))[0], framework="pt") as opened:
        return str(opened.get_tensor(next(iter(opened.keys()))).dtype).removeprefix("torch.")


def _other(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_text(encoding="utf-8") != text


def _write(folder: Path, files: dict[str, Any]) -> None:
    """Write files one by one, each in one rename, the config last."""
    for name, text in files.items():
        write_whole(folder / name, text)
