"""The benchmark of the large model, on a tiny one."""

from benchmarks.large import Shape, order_time, profiled, prune_time, streamed_time

TINY = Shape(blocks=2, hidden=32, ffn=64, heads=2, vocabulary=512, sequences=16, length=32)


def test_a_tiny_model_is_timed():
    found = prune_time(TINY, "cpu")
    assert found["after"] < found["parameters"]
    assert found["seconds"] > 0


def test_a_tiny_model_is_streamed():
    found = streamed_time(TINY, "cpu")
    assert found["after"] == prune_time(TINY, "cpu")["after"]
    assert found["seconds"] > 0


def test_time_is_told_apart():
    found = profiled(TINY, "cpu")
    assert 0 <= found["products"] <= found["busy"]
    assert len(found["longest"]) == 12


def test_every_channel_gets_a_cost():
    assert order_time(48, 16, "cpu")["least_cost"] >= 0
