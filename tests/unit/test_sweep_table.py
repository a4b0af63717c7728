"""The table of the sweep, and the knee by its rule."""

import json

import pytest
from benchmarks import record, table
from benchmarks.quality import SWEEP, SWEEP_SPARSITIES

from prunelm.knee import KNEES, beyond_knee


def test_the_knee_is_where_a_bent_line_bends():
    assert table.knee({s: max(s, 10 * s - 4.5) for s in SWEEP_SPARSITIES}) == 0.5


def test_the_table_says_what_cannot_be_met():
    dense = {"C4": {"value": 10.0}}
    sizes = {str(s): {"C4": {"value": 20.0}} if s < 0.8 else None for s in SWEEP_SPARSITIES}
    entries = {"dense": {"evaluation": dense}, "goa": {"sizes": sizes, "calibration": {"tokens": 64}}}
    lines = table._sweep(entries)
    assert f"| goa, C4 | {'0.693 | ' * 7}{'cannot be met | ' * 2}70% |" in lines
    assert table._sweep({}) == []
    assert SWEEP[1] == "goa"


@pytest.mark.parametrize("name", KNEES)
def test_the_knees_that_users_are_told_of_are_those_measured(name):
    entries = json.loads((record.RESULTS / "sweep.json").read_text())
    found = [table.knee(table.excesses(entries, name, text)) for text in entries["dense"]["evaluation"]]
    assert KNEES[name] == min(found)


def test_sizes_beyond_the_knee_are_told():
    assert beyond_knee("best", KNEES["best"]) == []
    (own,) = beyond_knee("best", 0.7)
    assert own.startswith("70% of the blocks is beyond the knee of this recipe (50% on SmolLM2-135M): ")
    (other,) = beyond_knee("somebody's", 0.9)
    assert "the knee of recipe 'best', the farthest measured (50% on" in other


@pytest.mark.parametrize("last", [5.0, 9.0])
def test_the_knee_does_not_hang_on_scale(last):
    curve = {s: last * s**3 for s in SWEEP_SPARSITIES}
    assert table.knee(curve) == table.knee({s: 2 * e for s, e in curve.items()})
