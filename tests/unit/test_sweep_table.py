"""The table of the sweep, and the knee by its rule."""

import pytest
from benchmarks import table
from benchmarks.quality import SWEEP, SWEEP_SPARSITIES


def test_the_knee_is_where_a_bent_line_bends():
    assert table.knee({s: max(s, 10 * s - 4.5) for s in SWEEP_SPARSITIES}) == 0.5


def test_the_table_says_what_cannot_be_met():
    dense = {"C4": {"value": 10.0}}
    sizes = {str(s): {"C4": {"value": 20.0}} if s < 0.8 else None for s in SWEEP_SPARSITIES}
    entries = {"dense": {"evaluation": dense}, "goa": {"sizes": sizes, "calibration": {"criterion": {"tokens": 64}}}}
    lines = table._sweep(entries)
    assert f"| goa, C4 | {'0.693 | ' * 7}{'cannot be met | ' * 2}70% |" in lines
    assert table._sweep({}) == []
    assert SWEEP[1] == "goa"


@pytest.mark.parametrize("last", [5.0, 9.0])
def test_the_knee_does_not_hang_on_scale(last):
    curve = {s: last * s**3 for s in SWEEP_SPARSITIES}
    assert table.knee(curve) == table.knee({s: 2 * e for s, e in curve.items()})
