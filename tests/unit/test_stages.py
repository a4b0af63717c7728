import time

import pytest
from benchmarks.stages import Stages, in_passes


def _work(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_every_stage_has_what_was_spent_until_the_next():
    stages = Stages()
    _work(0.02)
    for stage, seconds in (("surveying", 0.04), ("searching (2)", 0.03), ("searching", 0.03), ("pruning", 0.0)):
        stages(stage, 0, 1)
        _work(seconds)
    stages.end()
    assert list(stages.seconds) == ["derivatives", "surveying", "searching", "pruning"]
    assert stages.seconds["derivatives"] >= 0.02
    assert stages.seconds["surveying"] >= 0.04
    assert stages.seconds["searching"] >= 0.06


def test_the_search_is_counted_apart():
    spent = {"derivatives": 1.0, "surveying": 2.0, "searching": 6.0, "pruning": 3.0}
    assert in_passes(spent, 2.0) == pytest.approx((3.0, 3.0))
