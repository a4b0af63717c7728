"""Plug-ins: found by importing a folder or by entry point, named once, and described by their first line."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunelm.allocators import ALLOCATORS
from prunelm.architectures import ARCHITECTURES
from prunelm.criteria import CRITERIA, criterion
from prunelm.errors import PruneLMError, UnknownPluginError
from prunelm.reconstructions import RECONSTRUCTIONS
from prunelm.registry import Registry, did_you_mean

CAT = '''"""Cats."""
from zoo import ANIMALS

@ANIMALS("cat")
def cat() -> str:
    """Says meow.

    More about cats.
    """
    return "meow"
'''
STONE = '''"""A thing without a sound."""
from zoo import ANIMALS

ANIMALS.register("stone", 5, __name__)
'''
DOG = '''"""Dogs."""
from zoo import ANIMALS

@ANIMALS("dog")
def dog() -> str:
    """Says woof."""
    return "woof"
'''


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package with a registry of its own, two plug-ins in it, and an installed distribution that brings a third."""
    (tmp_path / "zoo").mkdir()
    init = 'from prunelm.registry import Registry\nANIMALS = Registry("animal", "zoo")\n'
    (tmp_path / "zoo" / "__init__.py").write_text(init)
    (tmp_path / "zoo" / "cat.py").write_text(CAT)
    (tmp_path / "zoo" / "stone.py").write_text(STONE)
    (tmp_path / "kennel.py").write_text(DOG)
    installed = tmp_path / "kennel-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kennel\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[prunelm.zoo]\ndog = kennel\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("zoo")
    for name in ("zoo", "zoo.cat", "zoo.stone", "kennel"):
        sys.modules.pop(name, None)


def test_plugins_are_imported_on_first_use(zoo: Any) -> None:
    assert "zoo.cat" not in sys.modules
    assert zoo.ANIMALS["cat"]() == "meow"
    assert "zoo.cat" in sys.modules


def test_names_are_sorted_and_come_from_folder_and_entry_points(zoo: Any) -> None:
    assert list(zoo.ANIMALS) == ["cat", "dog", "stone"]
    assert "dog" in zoo.ANIMALS
    assert "cow" not in zoo.ANIMALS
    assert zoo.ANIMALS["dog"]() == "woof"


def test_plugins_are_described_by_their_first_line_and_origin(zoo: Any) -> None:
    assert zoo.ANIMALS.describe() == [
        ("cat", "Says meow.", "zoo"),
        ("dog", "Says woof.", "kennel"),
        ("stone", "A thing without a sound.", "zoo"),
    ]


def test_unknown_names_are_answered_with_the_nearest(zoo: Any) -> None:
    with pytest.raises(UnknownPluginError) as caught:
        zoo.ANIMALS["catt"]
    assert str(caught.value) == "unknown animal 'catt'. Did you mean 'cat'? Known: cat, dog, stone."
    with pytest.raises(UnknownPluginError) as caught:
        zoo.ANIMALS["platypus"]
    assert str(caught.value) == "unknown animal 'platypus'. Known: cat, dog, stone."
    assert isinstance(caught.value, PruneLMError)
    assert isinstance(caught.value, LookupError)


def test_one_name_for_two_things_names_both_places() -> None:
    things: Registry[int] = Registry("thing", "nowhere")
    things.register("one", 1, "first.place")
    assert things.register("one", 1, "first.place") == 1
    with pytest.raises(ValueError, match=r"thing 'one' is registered twice: by first\.place and by second\.place"):
        things.register("one", 2, "second.place")


def test_decorator_gives_back_what_it_decorates(zoo: Any) -> None:
    def cow() -> str:
        return "moo"

    assert zoo.ANIMALS("cow")(cow) is cow
    assert zoo.ANIMALS["cow"] is cow


@pytest.mark.parametrize("registry", [ALLOCATORS, ARCHITECTURES, CRITERIA, RECONSTRUCTIONS], ids=lambda r: r.kind)
def test_ours_are_all_described(registry: Registry[Any]) -> None:
    rows = registry.describe()
    assert [name for name, _, _ in rows] == sorted(registry)
    assert rows
    for name, line, origin in rows:
        assert len(line) > 10, name
        assert origin == "prunelm"


def test_a_criterion_cannot_need_what_does_not_exist() -> None:
    @criterion("test-of-needs", needs={"consumer", "gradient"})
    def score(site: Any, statistics: Any) -> Any:
        """Nothing."""

    try:
        with pytest.raises(ValueError, match=r"'test-of-needs' needs \['gradient'\], but only"):
            CRITERIA["test-of-needs"].needs()
    finally:
        del CRITERIA._items["test-of-needs"], CRITERIA._origin["test-of-needs"]


def test_did_you_mean() -> None:
    assert did_you_mean("sparsty", ["sparsity", "samples"]) == "Did you mean 'sparsity'? "
    assert did_you_mean("zzz", ["sparsity", "samples"]) == ""
    assert did_you_mean("any", []) == ""
