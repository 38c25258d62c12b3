"""``python -m diablo``: the command line."""

from diablo_cli import main

main()
