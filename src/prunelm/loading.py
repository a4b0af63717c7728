"""Open a model from wherever it is: a folder, a hub name, a GGUF file, or a checkpoint that PruneLM wrote."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .dequantizing import dequantizing, forget_quantization_, quantization_of
from .errors import CheckpointError, PruneLMError, UnsupportedModelError
from .forms import check_form
from .headers import Held, check_axes, check_blocks, check_shapes, held_in, no_more_weights, shape_error
from .hidden import built_width, narrow_hidden_
from .per_block import stock_names
from .placement import AUTO, CPU, find_device, placed, spreads
from .shortage import ran_out
from .sites import Site, SiteSpec, find_sites, gone_sites, narrow_
from .spreading import spread

FORMAT = 1
PLAN_FILE = "pruning.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
_PLAN = {
    "loader": str,
    "widths": {str: {str: int}},
    "base_model?": str,
    "recipe?": {"unit?": str},
    "parameters?": {str: (int, float)},
    "sites?": {str: {"units": int, "kept": [int]}},
    "hidden?": (None, {"units": int, "kept": [int]}),
    "dropped_blocks?": [int],
    "calibration?": {str: {"tokens?": int, "ngrams?": {"modulus": int, "hashes": str}}},
    "notes?": [str],
    "versions?": {str: str},
}
"""What is read of a pruning.json, here and elsewhere."""
_BITS, _PICKLED = 8, 128
"""No quantized weight takes less than a bit, and no tensor in a pickle file less than so many bytes."""
DEEPEST = 64
"""Levels that a JSON file may have; those that are read here have fewer than ten."""
_WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "README.md"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model is: the name the user gave, its folder, and the GGUF file in it, if that is what it is.

    `device` is where it computes once it is loaded; `spread`: the first of several with some blocks each.
    """

    name: str
    folder: Path
    gguf: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    device: torch.device = CPU
    spread: bool = False

    @property
    def where(self) -> str:
        """The name of its device, as `find_model` takes it."""
        return AUTO if self.spread else str(self.device)

    def config(self) -> dict[str, Any]:
        """The config.json, in the words of stock transformers."""
        return stock_names(read_json(self.folder / "config.json"))

    def plan(self) -> dict[str, Any] | None:
        """The pruning.json of a checkpoint that PruneLM wrote, or None."""
        path = self.folder / PLAN_FILE
        if self.gguf or not path.is_file():
            return None
        plan = read_json(path)
        if plan.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {plan.get('format')!r} is not known here (this version reads {FORMAT}). "
                "Upgrade prunelm, or prune the dense model again."
            )
        check_form(plan, _PLAN, path)
        if any(n < 0 for sizes in plan["widths"].values() for n in sizes.values()):
            raise CheckpointError(f"{path}: widths must hold whole numbers from 0 up per site; the file is damaged")
        return plan


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: not there, not JSON, not an object, or nested deeper than any of these files is: what prints it
            with indents takes memory with the square of its depth.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, got {type(data).__name__}")
    level: list[Any] = [data]
    for _ in range(DEEPEST):
        level = [v for x in level if isinstance(x, dict | list) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return data
    raise CheckpointError(f"{path}: nested deeper than {DEEPEST} levels; the file is damaged")


def find_model(
    name: str | Path, *, trust_remote_code: bool = False, allow_pickle: bool = False, device: str | None = None
) -> Source:
    """Where the model is, its files checked as far as that can be done without loading it.

    Args:
        name: a Hugging Face folder, a hub name, or a .gguf file.
        trust_remote_code: run modeling code that comes with the checkpoint.
        allow_pickle: accept weights in pickle files, which can run any code when they are opened.
        device: where it computes once it is loaded; see `find_device`.

    Raises:
        CheckpointError: no such model, not a model folder, damaged files, or pickle weights.
        DeviceError: no such device.
        UnsupportedModelError: quantized in a way that cannot be undone here.
    """
    path, place = Path(name), find_device(device)
    if path.suffix == ".gguf":
        check_gguf(path)
        return Source(name=str(name), folder=path.parent, gguf=path.name, device=place, spread=spreads(device))
    folder = path if path.is_dir() else _from_hub(str(name), allow_pickle)
    source = Source(
        name=str(name),
        folder=folder,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        device=place,
        spread=spreads(device),
    )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder, it has no config.json")
    if not isinstance(source.config().get("model_type"), str):
        raise CheckpointError(f"{folder / 'config.json'}: it names no model_type, so no family can be found")
    quantization_of(source.config(), str(name))
    _check_attention(source)
    _check_weights(folder, allow_pickle)
    check_blocks(source.config(), _held(source), folder / "config.json")
    return source


def find_dense(name: str | Path, pruned: Source, **access: Any) -> Source:
    """Where the dense model is that a pruned one is compared with.

    Raises:
        CheckpointError: it is not there; says what the pruned model was made from.
    """
    try:
        return find_model(name, **access)
    except CheckpointError as error:
        plan = pruned.plan()
        if plan is None or "base_model" not in plan:
            raise
        raise CheckpointError(
            f"{error}. {pruned.name} was made from {plan['base_model']}: name the place where that is now, or leave "
            "--against out and measure what needs no dense model."
        ) from error


def _from_hub(name: str, allow_pickle: bool) -> Path:
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"no such model: {name!r} is not a folder")
    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED + ["*.bin"] * allow_pickle))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = str(error).split("\n")[0][:120]
        raise CheckpointError(
            f"no such model: {name!r} is no folder here, and the hub did not give it ({type(error).__name__}: {why})"
        ) from error


def _check_attention(source: Source) -> None:
    """Raise if the config has attention come from the hub, as code that would run here."""
    raw = source.config()
    parts = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    named = [part.get(key) for part in parts for key in ("attn_implementation", "_attn_implementation")]
    named += [name for several in named if isinstance(several, dict) for name in several.values()]
    foreign = next((name for name in named if isinstance(name, str) and "/" in name), None)
    if foreign is not None and not source.trust_remote_code:
        raise CheckpointError(
            f"{source.folder / 'config.json'}: attn_implementation {foreign!r} is code from the hub. Take that line "
            "out, or say --trust-remote-code if you trust its author."
        )


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all of which lie beside it."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: it has no weight_map of file names")
    folder = index.parent
    files = [folder / name for name in sorted(set(shards.values()))]
    outside = [f.name for f in files if f.name == ".." or f.parent.resolve() != folder.resolve()]
    if outside:
        raise CheckpointError(f"{index}: {outside[0]!r} lies outside the folder")
    return files


def _check_weights(folder: Path, allow_pickle: bool) -> None:
    index, other = folder / "model.safetensors.index.json", folder / "pytorch_model.bin.index.json"
    files = _shards(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if allow_pickle and other.is_file():
        _shards(other)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if not files and pickled and not allow_pickle:
        raise CheckpointError(
            f"{folder}: its weights are pickle files ({pickled[0]}), which can run any code when opened. Convert them "
            "to safetensors, or say --allow-pickle if you trust their author."
        )
    if not files and not pickled:
        raise CheckpointError(f"{folder}: not a model folder, it has no .safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or cut short ({error}). Get the file again.") from error


def check_gguf(path: Path) -> None:
    """Raise unless a file is a whole GGUF file.

    Raises:
        CheckpointError: says whether it is missing, damaged, or cut short.
    """
    from .gguf_header import gguf_header

    if not path.is_file():
        raise CheckpointError(f"no such model: there is no file {str(path)!r}")
    try:
        header = gguf_header(path)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: not a GGUF file, or damaged ({error}). Get the file again.") from error
    end = header.end
    if end == 0 or end > path.stat().st_size:
        raise CheckpointError(
            f"{path}: cut short: its tensors need {end:,} bytes, the file has {path.stat().st_size:,}. Get it again."
        )
    if header.blocks > header.tensors:
        raise CheckpointError(
            f"{path}: block_count is {header.blocks:,}, and the file holds {header.tensors:,} tensors. Get the file "
            "again."
        )


def _held(source: Source) -> Held:
    """What the weight files hold by their headers, or by their sizes where that is all that is known of them."""
    if source.gguf is not None:
        from .gguf_header import gguf_header

        header = gguf_header(source.folder / source.gguf)
        return Held(tensors=header.tensors, numbers=header.numbers)
    size = bytes_on_disk(source)
    files = _read_files(source)
    if any(file.suffix != ".safetensors" for file in files):
        return Held(tensors=size // _PICKLED, numbers=size)
    held = held_in(files)
    if source.config().get("quantization_config") or source.config().get("compression_config"):
        return Held(tensors=held.tensors, numbers=_BITS * size)
    return held


def load_model(source: Source, *, dtype: torch.dtype | None = torch.float32) -> PreTrainedModel:
    """The model in eval mode, of the class its config names; `dtype` None keeps the stored one.

    Raises:
        CheckpointError: weights are missing or do not fit the config; names them.
        UnsupportedModelError: transformers does not know the model type.
    """
    shapes = skeleton(source)
    options: dict[str, Any] = {"dtype": dtype or "auto"}
    plan = source.plan()
    if source.gguf is not None:
        return _load_gguf(source, {**options, "config": shapes.config})
    if plan is not None and plan.get("loader") == "prunelm":
        cls, config = _narrowed_class(source, plan)
        options["config"] = config
    else:
        cls = _class_named(source)
        options["trust_remote_code"] = source.trust_remote_code
    with _answered(source, "cannot be loaded"):
        quantized = quantization_of(source.config(), source.name)
        plain = dtype is not None and not source.trust_remote_code and quantized is None
        weights = unmapped(source.folder) if plain else None
        if quantized is not None:
            options |= dequantizing(quantized)
        if weights is not None:
            options |= {"state_dict": weights, "generation_config": generation_config(source.folder)}
            options["config"] = options.get("config") or AutoConfig.from_pretrained(
                str(source.folder), trust_remote_code=False
            )
        model, info = cls.from_pretrained(
            None if weights else str(source.folder),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_loaded(source, info)
    if quantized is not None:
        forget_quantization_(model)
    return _on_its_devices(model.eval(), source)


def _check_loaded(source: Source, info: Mapping[str, Any]) -> None:
    """Raise if weights of a model did not come from the files, by what transformers says of them."""
    wrong, missing = sorted(info["mismatched_keys"]), sorted(info["missing_keys"])
    if wrong:
        weight, stored, built = wrong[0]
        raise shape_error(source.name, len(wrong), weight, stored, built)
    if missing:
        raise CheckpointError(f"{source.name}: {len(missing)} weights are missing, first {missing[0]}")


def unmapped(folder: Path) -> dict[str, Any] | None:
    """Slices of the weights that are read from the files one by one; None where there are only pickle files.

    Memory-mapped weights, the default of `from_pretrained`, stay resident until the last of them is gone, so a model
    pruned in place would hold its dense weights to the end.
    """
    files = _read_by_name(folder)
    if not files:
        return None
    opened: list[Any] = [safe_open(file, framework="pt", backend="pread") for file in files]
    slices = {key: (file, file.get_slice(key)) for file in opened for key in file.keys()}  # noqa: SIM118
    # A slice of a tensor without elements, as a sublayer without units has them, cannot be read.
    return {key: part if all(part.get_shape()) else file.get_tensor(key) for key, (file, part) in slices.items()}


def _read_by_name(folder: Path) -> list[Path]:
    """The .safetensors files that transformers reads from a folder, whichever others lie there; none if one is gone."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = _shards(index) if index.is_file() and not whole.is_file() else [whole]
    return files if all(file.is_file() for file in files) else []


def generation_config(folder: Path) -> transformers.GenerationConfig | None:
    """The folder's own settings of generation, or None."""
    there = (folder / "generation_config.json").is_file()
    return transformers.GenerationConfig.from_pretrained(str(folder)) if there else None


@contextlib.contextmanager
def _answered(source: Source, what: str) -> Iterator[None]:
    """Whatever transformers makes of damaged files becomes one line."""
    try:
        yield
    except PruneLMError:
        raise
    except _DAMAGED as error:
        if ran_out(error):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        asks = "trust_remote_code" in str(error) and not source.trust_remote_code
        way = " If you trust its code, say --trust-remote-code." if asks else ""
        why = " ".join(line.strip() for line in lines[: 1 + lines[0].endswith(":")])
        raise CheckpointError(f"{source.name}: {what}: {why[:300]}{way}") from error


def _on_its_devices(model: PreTrainedModel, source: Source) -> PreTrainedModel:
    return spread(model) if source.spread else placed(model, source.device)


def _class_named(source: Source) -> Any:
    """The class that opens a folder as it stands: through its own code where that is trusted, or else a stock one.

    Raises:
        CheckpointError: nothing but its own code opens it; says how to trust that.
        UnsupportedModelError: transformers does not know the model type or the class.
    """
    raw = read_json(source.folder / "config.json")
    mapped = raw.get("auto_map")
    mapped = mapped if isinstance(mapped, dict) else {}
    if source.trust_remote_code:
        name = next(iter(_class_names(source.name, raw)), None)
        own = [auto for auto, place in mapped.items() if str(place).rpartition(".")[2] == name]
        usual = [auto for auto in mapped if auto == "AutoModelForCausalLM"]
        automatic = next((auto for auto in [*reversed(own), *usual, *mapped] if auto.startswith("AutoModel")), "")
        return getattr(transformers, automatic, None) or _stock_class(source)
    if raw.get("model_type") != source.config()["model_type"]:
        way = "say --trust-remote-code if you trust it" if mapped else "there is none, so get that file back"
        raise CheckpointError(
            f"{source.name}: its blocks differ in width, and without {PLAN_FILE} only its code opens it: {way}"
        )
    return _stock_class(source)


def _class_names(where: str, raw: Mapping[str, Any]) -> list[str]:
    """The classes that a config names."""
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: architectures in its config must be a list of class names")
    return names


def _stock_class(source: Source) -> Any:
    """The class of transformers that the config names; where it knows none, and code is trusted, the automatic one.

    Raises:
        UnsupportedModelError: transformers does not know the model type or the class.
    """
    raw = source.config()
    names, unknown = _class_names(source.name, raw), None
    if raw["model_type"] not in transformers.CONFIG_MAPPING:
        unknown = f"does not know model_type {raw['model_type']!r}"
    elif names and not hasattr(transformers, names[0]):
        unknown = f"has no class {names[0]!r}"
    if unknown and not source.trust_remote_code:
        raise UnsupportedModelError(
            f"{source.name}: transformers {unknown}. If its code comes with the checkpoint and you trust it, say "
            "--trust-remote-code."
        )
    return transformers.AutoModelForCausalLM if unknown or not names else getattr(transformers, names[0])


def _load_gguf(source: Source, options: dict[str, Any]) -> PreTrainedModel:
    with _answered(source, "cannot be loaded"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            str(source.folder),
            gguf_file=source.gguf,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    _check_loaded(source, info)
    forget_quantization_(model)
    return _on_its_devices(model.eval(), source)


def _narrowed_class(source: Source, plan: Mapping[str, Any]) -> tuple[Any, Any]:
    """A stock class that narrows itself to the plan's widths while it is built, and the dense config for it.

    Under `from_pretrained` building happens without memory, so sharding, dtype and devices stay its business.
    """
    with _answered(source, "its config builds no model"):
        config = _dense_config(source)
    stock, held = _stock_class(source), _held(source)

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        stock.__init__(self, config, *args, **kwargs)
        check_axes(self, held, source.name)
        narrow_to_(self, plan["widths"])

    narrowed = type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})
    return narrowed, config


def _dense_config(source: Source) -> Any:
    """The config without the widths of single blocks, which no stock class can read yet."""
    return AutoConfig.for_model(**{k: v for k, v in source.config().items() if k != "per_layer_config"})


def widths(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """The sizes of every site and of a narrowed hidden axis, from which `narrow_to_` makes the same shapes again."""
    found = {}
    for site in find_sites(model):
        measures = site.measures(site.n_units)
        found[site.key] = {name: measures[name] for name in _sizes(site.spec)}
    if built_width(model) is not None:
        found["hidden"] = {"units": int(model.config.hidden_size)}
    return found | {key: dict.fromkeys(_sizes(spec), 0) for key, spec in gone_sites(model).items()}


def _sizes(spec: SiteSpec) -> tuple[str, ...]:
    return ("units",) if spec.probabilities is None else ("kv_heads", "queries")


def narrow_to_(
    model: PreTrainedModel,
    wanted: Mapping[str, Mapping[str, int]],
    before: Callable[[Site, torch.Tensor], None] = lambda _site, _kept: None,
) -> None:
    """Narrow a dense model to some widths, keeping whichever units; the right weights are read afterwards.

    `before` is called with each site and the units that it will keep, before it is narrowed.
    """
    hidden = wanted.get("hidden", {}).get("units")
    if hidden is not None and hidden < model.config.hidden_size:
        narrow_hidden_(model, torch.arange(hidden, device="cpu"))
    for unit, names in (("group", ("units", "kv_heads")), ("query", ("queries",))):
        for key in [site.key for site in find_sites(model, unit)]:
            site = next((s for s in find_sites(model, unit) if s.key == key), None)
            if site is None:
                continue
            kept = next((wanted[key][name] for name in names if key in wanted and name in wanted[key]), site.n_units)
            if kept < site.n_units:
                units = _evenly(site.n_units, kept, site.strata)
                before(site, units)
                narrow_(site, units)


def _evenly(units: int, kept: int, strata: int) -> torch.Tensor:
    """Any `kept` units, the same number from each stratum."""
    per, keep = units // strata, kept // strata
    return torch.cat([torch.arange(keep, device="cpu") + s * per for s in range(strata)])


def skeleton(
    source: Source, plan: Mapping[str, Any] | None = None, *, buffers: bool = False, fitting: bool = True
) -> PreTrainedModel:
    """The model's shapes without its weights: built on the meta device, in no time and no memory.

    Args:
        source: where the model is.
        plan: a pruning.json in place of the source's own.
        buffers: those that the model computes itself have values.
        fitting: the shapes must be those that are stored.

    Raises:
        CheckpointError: the config cannot be read, or asks for more than the weight files hold.
        UnsupportedModelError: transformers does not know the model type.
    """
    with _answered(source, "its config builds no model"):
        held, plan = _held(source), plan or source.plan()
        with no_more_weights(held, source.name):
            model = _built(source, plan, torch.device("meta"))
        if fitting:
            check_shapes(model, held, source.name)
        return _built(source, plan, init_empty_weights(include_buffers=False)) if buffers else model


def _built(source: Source, plan: Mapping[str, Any] | None, where: Any) -> PreTrainedModel:
    """The model of a config, as large as the config says."""
    if source.gguf is not None:
        config = AutoConfig.from_pretrained(str(source.folder), gguf_file=source.gguf)
        cls: Any = transformers.AutoModelForCausalLM
    elif plan is not None and plan.get("loader") == "prunelm":
        cls, config = _narrowed_class(source, plan)
    else:
        cls = _class_named(source)
        config = AutoConfig.from_pretrained(str(source.folder), trust_remote_code=source.trust_remote_code)
    with where:
        if hasattr(cls, "from_config"):
            return cls.from_config(config, trust_remote_code=source.trust_remote_code)
        return cls(config)


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype that the weights are stored in; float16 for a GGUF file, whose blocks hold float16 scales."""
    if source.gguf is not None:
        return torch.float16
    raw = source.config()
    name = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def weight_files(source: Source) -> list[Path]:
    """The files that hold the weights: those in pickle only where transformers finds no others by their names."""
    if source.gguf is not None:
        return [source.folder / source.gguf]
    stored, pickled = (sorted(source.folder.glob(kind)) for kind in ("*.safetensors", "*.bin"))
    return pickled if pickled and not _read_by_name(source.folder) else stored or pickled


def bytes_on_disk(source: Source) -> int:
    """Size of the weight files that are read, whichever others lie beside them."""
    return sum(file.stat().st_size for file in _read_files(source))


def _read_files(source: Source) -> list[Path]:
    """The weight files that transformers reads."""
    named = _read_by_name(source.folder) if source.gguf is None else []
    return named or weight_files(source)


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that comes with the model.

    Raises:
        CheckpointError: there is none.
    """
    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    plan = source.plan()
    if plan is not None and plan.get("loader") == "prunelm":
        options["config"] = _narrowed_class(source, plan)[1]
    with _answered(source, "no tokenizer can be loaded from it"):
        if not source.gguf and "per_layer_config" in source.config():
            options["config"] = _dense_config(source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(source.folder), trust_remote_code=source.trust_remote_code, **options
        )
    return tokenizer


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a checkpoint that PruneLM wrote, whatever its widths, with no remote code.

    Also opens every other model that `prune` accepts.

    Raises:
        CheckpointError: not a model, or damaged.
    """
    return load_model(find_model(path, device="cpu"), dtype=dtype)
