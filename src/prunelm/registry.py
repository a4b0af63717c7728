"""Named plug-ins: ours by importing a folder on first use, other people's by entry point."""

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from .errors import UnknownPluginError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence naming the nearest known word, or an empty string; ends with a space when not empty."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}? " if close else ""


class Registry(Generic[T]):
    """Plug-ins of one kind by name; the package that holds ours is imported on first use."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}
        self._origin: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str, item: T, origin: str) -> T:
        """The item itself, now known as `name`. Two items of one name are an error naming both places."""
        if name in self._items and self._items[name] is not item:
            raise ValueError(f"{self.kind} {name!r} is registered twice: by {self._origin[name]} and by {origin}")
        self._items[name] = item
        self._origin[name] = origin
        return item

    def adopt(self, name: str, item: T, function: F) -> F:
        """The function itself, once the item made of it is registered under its documentation and its module."""
        object.__setattr__(item, "__doc__", function.__doc__)
        self.register(name, item, function.__module__)
        return function

    def __call__(self, name: str) -> Callable[[T], T]:
        """A decorator that registers what it decorates under `name`."""

        def decorate(item: T) -> T:
            return self.register(name, item, getattr(item, "__module__", self.package))

        return decorate

    def __getitem__(self, name: str) -> T:
        self._load()
        if name not in self._items:
            hint = did_you_mean(name, self._items)
            raise UnknownPluginError(f"unknown {self.kind} {name!r}. {hint}Known: {', '.join(sorted(self._items))}.")
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def describe(self) -> list[tuple[str, str, str]]:
        """(name, first line of its documentation, origin) of every plug-in."""
        rows = []
        for name in self:
            module = importlib.import_module(self._origin[name])
            doc = inspect.getdoc(self._items[name]) if callable(self._items[name]) else inspect.getdoc(module)
            rows.append((name, (doc or "").split("\n")[0], self._origin[name].split(".")[0]))
        return rows

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        group = f"prunelm.{self.package.rsplit('.', 1)[-1]}"
        for entry in importlib.metadata.entry_points(group=group):
            entry.load()
