"""`python -m mal_adapter.cli`, where the console script is not on the PATH."""

from mal_adapter.cli import main

main()
