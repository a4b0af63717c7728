"""How far pruning goes: the size beyond which every further tenth costs more than the average one, as measured."""

KNEES = {"best": 0.5, "goa": 0.5}
"""The knee of a recipe's sweep from 10 % of the blocks to the most that it can take, 70 % for both, on the text where
it comes first: docs/results.md."""
MEASURED_ON = "SmolLM2-135M"


def beyond_knee(recipe: str, share: float) -> list[str]:
    """What results say of a size beyond the knee: that of the recipe, or the farthest that was measured.

    Args:
        recipe: its name.
        share: of the parameters in the blocks that goes.

    Source: Satopaa, Albrecht, Irwin, Raghavan 2011 ("Kneedle") for the rule.
    """
    name = recipe if recipe in KNEES else max(KNEES, key=lambda known: KNEES[known])
    knee = KNEES[name]
    if share <= knee:
        return []
    whose = "this recipe" if name == recipe else f"recipe {name!r}, the farthest measured"
    return [
        f"{share:.0%} of the blocks is beyond the knee of {whose} ({knee:.0%} on {MEASURED_ON}): from there on every "
        "further tenth costs more than the average one. Measure the result before you use it (prunelm evaluate)"
    ]
