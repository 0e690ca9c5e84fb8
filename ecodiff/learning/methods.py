"""Ways to rank units, by name: the modules that are imported here register theirs."""

from torch import nn

from ..architectures import find_groups
from ..units import ALL_KINDS
from . import gauss_newton, scoring, surgeon  # noqa: F401 - imported for what they register
from .scoring import METHODS

__all__ = ["METHODS", "measured_best"]

MEMORY = 8 << 30  # bytes that the surgeon's statistics may take where it is chosen by default


def measured_best(denoiser: nn.Module, default: str) -> str:
    """The preset that is measured to be best for a model of this kind (benchmarks/fidelity*.json).

    Where modulation has directions, a method that finds them: the surgeon, if memory lasts, else the plain
    diagonal. Elsewhere `default`.
    """
    if not any(group.activations for group in find_groups(denoiser, ALL_KINDS)):
        return default
    return "surgeon" if surgeon.statistics_bytes(denoiser) < MEMORY else "gauss-newton"
