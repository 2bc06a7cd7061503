"""How often progress bars speak."""

import sys


def progress_interval() -> float:
    """Seconds between two states of a bar: quick on a terminal, seldom in a log file."""
    return 0.2 if sys.stderr.isatty() else 15.0
