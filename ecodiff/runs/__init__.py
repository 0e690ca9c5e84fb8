"""Runs: mask learning jobs on disk, resumable after a kill."""

from .folder import Run
from .store import RunStore

__all__ = ["Run", "RunStore"]
