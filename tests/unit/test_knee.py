"""Sizes beyond the measured knee are said, and the knee is the measured one."""

import json
from pathlib import Path

import pytest
from benchmarks import table

from prunelm.job import plan_counts
from prunelm.knee import KNEE, beyond_knee
from prunelm.recipe import Recipe
from prunelm.testing import tiny_model


def test_the_knee_is_the_first_that_the_sweep_found():
    entries = json.loads((Path(table.__file__).parent / "results" / "sweep.json").read_text())
    found = [table.knee(table.excesses(entries, name, text)) for name in table.SWEEP for text in ("WikiText-2", "C4")]
    assert min(found) == KNEE


@pytest.mark.parametrize(("share", "told"), [(0.1, 0), (KNEE, 0), (KNEE + 0.1, 1)])
def test_only_sizes_beyond_it_are_said(share, told):
    assert len(beyond_knee(share)) == told
    job = plan_counts(tiny_model("llama"), Recipe(sparsity=share, multiple_of=1, min_units=0, per_block=True))
    assert sum("every further tenth" in note for note in job.notes) == told
