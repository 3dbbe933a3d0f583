"""`python -m batch` is the same command as `restyle`."""

from batch.cli import main

main()
