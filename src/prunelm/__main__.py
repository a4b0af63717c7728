"""`python -m prunelm` is the command line."""

from .cli import main

main()
