"""What the commands do, as functions: one module for each, and those for the files and texts that they share."""

DEFAULT_RECIPE = "best-uniform"
"""What is used where no recipe is named: the best that every loader opens."""
PLAIN_RECIPE = "obs"
"""The same without a search, for when the model cannot be looked at first."""
QUICK_RECIPE = "goa-budget"
"""What is used where a newcomer waits."""


def default_recipe(*, looks: bool = True, per_block: bool = False) -> str:
    """The best recipe where none is named: with or without a look at the model, with equal widths or others."""
    if not looks:
        return PLAIN_RECIPE
    return "best" if per_block else DEFAULT_RECIPE
