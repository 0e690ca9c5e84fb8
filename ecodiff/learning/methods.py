"""Ways to rank units, by name: the modules that are imported here register theirs."""

from torch import nn

from ..architectures import find_groups
from ..units import ALL_KINDS
from . import gauss_newton, scoring, surgeon  # noqa: F401 - imported for what they register
from .scoring import METHODS

__all__ = ["METHODS", "measured_best"]

MEMORY = 20 * 10**9  # bytes that the surgeon's statistics may take where it is chosen by default


def measured_best(denoiser: nn.Module, default: str) -> str:
    """The preset that is measured to be best, repaired (benchmarks/fidelity*.json).

    The surgeon, if memory lasts; else, where modulation has directions, the plain diagonal, which finds them
    too; else `default`.
    """
    if surgeon.statistics_bytes(denoiser) < MEMORY:
        return "surgeon"
    directed = any(group.activations for group in find_groups(denoiser, ALL_KINDS))
    return "gauss-newton" if directed else default
