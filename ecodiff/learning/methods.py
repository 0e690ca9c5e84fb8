"""Every way to rank units, by name: the modules that are imported here register theirs."""

from . import scoring, surgeon  # noqa: F401 - imported for what they register
from .scoring import METHODS

__all__ = ["METHODS"]
