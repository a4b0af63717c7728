"""The form that data from a file must have, checked before anything hangs on it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError, PruneLMError

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
MOST_SAID = 60
"""Characters of a wrong value that a message repeats."""


def check_form(data: Any, form: Any, path: Path, place: str = "") -> None:
    """Raise unless data from the file at `path` have a form.

    Args:
        data: as JSON gives it.
        form: a type; `[form]`, a list of such; `{str: form}`, an object of such; `{"name": form, "other?": form}`, an
            object with these fields, those with a question mark optional, and any others; a tuple of such, any of them;
            None, null.
        path: of the file.
        place: of the data in it.

    Raises:
        CheckpointError: names the first place where it has not.
    """
    if isinstance(form, tuple):
        for other in form:
            if _fits(data, other):
                check_form(data, other, path, place)
                return
    if isinstance(form, tuple) or not _fits(data, form):
        raise CheckpointError(
            f"{path}: {place or 'it'} must be {_said(form)}, got {repr(data)[:MOST_SAID]}; the file is damaged"
        )
    if isinstance(form, list):
        for n, item in enumerate(data):
            check_form(item, form[0], path, f"{place}[{n}]")
    elif isinstance(form, Mapping):
        if str in form:
            form = dict.fromkeys(data, form[str])
        for name, inner in form.items():
            name, optional = name.removesuffix("?"), name.endswith("?")
            if name in data:
                check_form(data[name], inner, path, f"{place}.{name}".lstrip("."))
            elif not optional:
                raise CheckpointError(f"{path}: {place or 'it'} has no {name!r}; the file is damaged")


@contextlib.contextmanager
def damage_answered(what: object) -> Iterator[None]:
    """Whatever comes of reading damaged data in the body becomes one line.

    Raises:
        CheckpointError: names the file or folder.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, PruneLMError):
            raise
        raise CheckpointError(
            f"{what}: a file there is damaged, or not what it should be ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _fits(data: Any, form: Any) -> bool:
    """Whether data are of the kind that a form says, apart from what they hold."""
    if form is None:
        return data is None
    if isinstance(form, list | Mapping):
        return isinstance(data, list if isinstance(form, list) else dict)
    if form in (int, float):
        return isinstance(data, int | form) and not isinstance(data, bool)
    return isinstance(data, form)


def _said(form: Any) -> str:
    """A form in words."""
    if isinstance(form, tuple):
        return " or ".join(map(_said, form))
    if form is None:
        return "null"
    kind = list if isinstance(form, list) else dict if isinstance(form, Mapping) else form
    return _WORDS[kind]
