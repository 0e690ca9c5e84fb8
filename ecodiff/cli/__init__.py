"""The command line: `python -m ecodiff`."""

from .commands import main

__all__ = ["main"]
