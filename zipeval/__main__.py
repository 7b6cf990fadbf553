"""`python -m zipeval` is `zipeval`."""

from zipeval.cli import main

main()
