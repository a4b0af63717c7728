"""Benchmarks: each writes JSON with everything that must be said beside a figure; `table` makes docs/results.md."""
