"""``python -m qpool``."""

from qpool.cli import main

main()
