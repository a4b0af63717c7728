"""Where quality breaks down, as measured; sizes beyond it are allowed, and said."""

KNEE = 0.5
"""Share of the blocks from which on every further tenth cost more than the average one, by the sweep of
`benchmarks/results/sweep.json` (SmolLM2-135M; a test compares them)."""


def beyond_knee(share: float) -> list[str]:
    """What to tell of a share of the blocks to remove: nothing up to the knee."""
    if share <= KNEE:
        return []
    return [
        f"{share:.0%} of the blocks is more than {KNEE:.0%}, from where on every further tenth cost more than the "
        "average one when SmolLM2-135M was pruned by 10 to 90 %: evaluate the result before it is used"
    ]
