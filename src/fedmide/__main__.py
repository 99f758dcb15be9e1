"""`python -m fedmide`: the command line."""

from fedmide.cli import main

main()
