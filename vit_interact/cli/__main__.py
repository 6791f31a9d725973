"""`python -m vit_interact.cli`."""

from vit_interact.cli import main

main()
