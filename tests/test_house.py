"""Rules of the house that a machine can check."""

import ast
import importlib
import importlib.metadata
import itertools
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import prunelm
from prunelm.architectures import ARCHITECTURES

SOURCE = Path(prunelm.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LAYERS = [
    {"errors", "exported", "progress", "tasks", "overlap", "intervals", "noising", "doubts", "knee", "heap"},
    {"shortage"},
    {"registry", "policy", "locking", "gguf_header", "forms", "distributed", "differing"},
    {"writing", "placement"},
    {"sites", "moments", "solver", "elimination", "exchange", "ascending", "results"},
    {"stream", "plan", "architectures", "stock", "hidden", "spreading"},
    {"targets", "repetition", "layer_outputs"},
    {
        "similarity",
        "data",
        "speed",
        "knapsack",
        "biases",
        "depth",
        "variables",
        "masking",
        "per_block",
        "scoring",
        "journal",
        "dequantizing",
        "headers",
        "storage",
    },
    {"memory", "workbench", "scratch"},
    {"losses", "probable", "limits", "own_work"},
    {"gradients", "encoders"},
    {"fisher", "importance", "hidden_scores"},
    {"criteria", "allocators", "reconstructions", "generate", "streamed_fisher"},
    {"recipe", "observation", "repairing"},
    {"job", "reading", "rehearsal", "card", "loading", "verify", "evaluation", "search"},
    {"stored_weights"},
    {"shelf"},
    {"sensitivity", "pressing", "derivatives", "policy_search", "hidden_repair", "plan_file", "streamed_scores"},
    {"survey", "descent", "hidden_pruning", "curves", "streaming", "natural_gradient"},
    {"fusion"},
    {"allocation", "consumer_repair", "gguf_vocabulary"},
    {"pruning", "matching", "outline"},
    {"checkpoint", "family", "testing"},
    {"calibration", "finalizing", "footprint"},
    {"export_files"},
    {"padding", "decilm_export", "gguf_export", "onnx_export", "torchao_export"},
    {"exporting"},
    {"suite", "sizing", "perplexity_limit", "layer_times", "quantizing"},
    {"speed_limit"},
    {"sized_pruning"},
    {"workflow"},
    {"text_matrix", "report", "planning", "resuming"},
    {"demo"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
BANNED = {"utils", "helpers", "common", "manager", "handler", "base", "misc", "core"}


def _room(path):
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def _top_level_imports(path):
    """Rooms that a file imports when it is imported; imports inside functions are deliberate exceptions."""
    depth = len(path.relative_to(SOURCE).parts)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = _room(path)
    for imported in _top_level_imports(path):
        assert imported == room or RANK[imported] < RANK[room], f"{path.name} imports {imported}"


def test_every_file_has_its_place():
    assert {_room(path) for path in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_names_and_numbers(path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in BANNED
    assert not re.search(r"model\.model\.layers|head_dim\s*=\s*(64|128)\b", text)
    assert "pickle.load" not in text
    assert "torch.load" not in text
    assert not re.search(r"except:|except Exception( as \w+)?:", text)


def test_no_model_names_in_logic():
    families = {*ARCHITECTURES, "qwen", "gemma"}
    for path in FILES:
        if _room(path) in {"architectures", "testing", "demo"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                words = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not words & families, f"{path.name}:{node.lineno} compares with {words & families}"


def test_what_is_imported_is_a_dependency():
    """Packages that come with others would be missing in an environment that has only what the project asks for."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=!~ \[]", one)[0].lower().replace("-", "_") for one in asked} | {"prunelm"}
    distributions = importlib.metadata.packages_distributions()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module else []
            for top in {module.partition(".")[0] for module in modules} - set(sys.stdlib_module_names):
                known = {one.lower().replace("-", "_") for one in distributions.get(top, [top])}
                assert known & names, f"{path.name} imports {top}, which is no dependency"


def test_the_public_page_is_complete():
    importlib.import_module("prunelm.plan")
    for name in prunelm.__all__:
        assert getattr(prunelm, name).__doc__, name
        assert not isinstance(getattr(prunelm, name), ModuleType), name
    with pytest.raises(AttributeError, match="no attribute 'prunned'"):
        _ = prunelm.prunned
