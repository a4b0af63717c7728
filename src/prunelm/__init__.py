"""PruneLM: smaller transformer language models by structured pruning, without retraining.

The whole public API is on this page; everything is imported when it is first used, so that the command line is fast.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import save as save
    from .data import read_documents as read_documents
    from .data import sample_batches as sample_batches
    from .errors import PruneLMError as PruneLMError
    from .exporting import export as export
    from .finalizing import finalize as finalize
    from .limits import limit_of as limit_of
    from .loading import load as load
    from .planning import plan as plan
    from .pruning import Report as Report
    from .pruning import prune_ as prune_
    from .recipe import Recipe as Recipe
    from .report import write_report as write_report
    from .resuming import resume as resume
    from .sites import find_sites as find_sites
    from .sites import narrow_ as narrow_
    from .suite.measuring import measure as measure
    from .text_matrix import transfer as transfer
    from .workflow.calibrating import calibrate as calibrate
    from .workflow.comparing import compare as compare
    from .workflow.evaluating import evaluate as evaluate
    from .workflow.inspecting import inspect as inspect
    from .workflow.one_size import prune as prune
    from .workflow.repairing import repair as repair
    from .workflow.several_sizes import prune_sizes as prune_sizes

_HOME = {
    "PruneLMError": "errors",
    "Recipe": "recipe",
    "Report": "pruning",
    "calibrate": "workflow.calibrating",
    "compare": "workflow.comparing",
    "evaluate": "workflow.evaluating",
    "export": "exporting",
    "finalize": "finalizing",
    "find_sites": "sites",
    "inspect": "workflow.inspecting",
    "limit_of": "limits",
    "load": "loading",
    "measure": "suite.measuring",
    "narrow_": "sites",
    "plan": "planning",
    "prune": "workflow.one_size",
    "prune_": "pruning",
    "prune_sizes": "workflow.several_sizes",
    "repair": "workflow.repairing",
    "resume": "resuming",
    "read_documents": "data",
    "sample_batches": "data",
    "save": "checkpoint",
    "transfer": "text_matrix",
    "write_report": "report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunelm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


class _Public(ModuleType):
    """This package, where the function `plan` is not hidden by the module of that name once that is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Public
