"""`python -m guard.cli` is `guard`."""

from guard.cli import main

main()
