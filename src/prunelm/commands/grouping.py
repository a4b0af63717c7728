"""Options that belong together: the fields of a dataclass, declared once and read by any number of commands."""

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with every parameter of a dataclass spread into its fields, which is what a command line can say."""
    groups = {name: kind for name, kind in _declared(command).items() if isinstance(kind, type) and is_dataclass(kind)}
    options = []
    for parameter in inspect.signature(command).parameters.values():
        kind = groups.get(parameter.name)
        options += _options(kind) if kind is not None else [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    def spread(**given: Any) -> None:
        gathered = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **gathered)

    spread.__name__, spread.__doc__ = command.__name__, command.__doc__
    spread.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    spread.__annotations__ = {option.name: option.annotation for option in options}
    return spread


def _options(kind: type[Any]) -> list[inspect.Parameter]:
    """The fields of a dataclass as options with defaults, under the heading that it names as PANEL."""
    declared = _declared(kind)
    panel = getattr(kind, "PANEL", None)
    return [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=_under(panel, declared[f.name])
        )
        for f in fields(kind)
    ]


def _under(panel: str | None, annotation: Any) -> Any:
    """The annotation with its option under a heading of --help; None leaves it with the rest."""
    (option,) = annotation.__metadata__
    moved = copy(option)
    moved.rich_help_panel = panel
    return Annotated[annotation.__origin__, moved]


def _declared(what: Any) -> dict[str, Any]:
    return get_type_hints(what, include_extras=True)
