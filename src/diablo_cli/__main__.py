"""``python -m diablo_cli``."""

from diablo_cli import main

main()
