"""What the commands do, as functions: one module for each, and those for the files and texts that they share."""

DEFAULT_RECIPE = "goa-budget"
"""What is used where no recipe is named."""
