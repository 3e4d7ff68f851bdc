"""``python -m dgmr`` is the command ``dgmr``."""

from dgmr.cli import main

main()
