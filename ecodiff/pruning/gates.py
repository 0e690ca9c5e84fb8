"""Hard-concrete gates (Louizos et al. 2018, arXiv 1712.01312)."""

from math import log

import torch
from torch import Tensor

TEMPERATURE = 2 / 3  # beta

STRETCH = (-0.1, 1.1)  # gamma, zeta


def sample(log_alpha: Tensor, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Draw gates in [0, 1] (their eqs. 10 and 11).

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta), stretched to (gamma, zeta), clipped.

    Args:
        log_alpha: float32, (units,). The larger, the more surely the unit is kept.
        noise: u, uniform in (0, 1), the same shape. 0.5 everywhere gives the median gate.
    """
    logistic = torch.logit(noise, eps=1e-6)
    return _stretch(torch.sigmoid((logistic + log_alpha) / temperature))


def hard(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The gate without noise, used to rank and to report (their eq. 13)."""
    return _stretch(torch.sigmoid(log_alpha / temperature))


def open_probability(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """P(gate > 0), the closed form of the expected L0 norm (their eq. 12)."""
    gamma, zeta = STRETCH
    return torch.sigmoid(log_alpha - temperature * log(-gamma / zeta))


def _stretch(s: Tensor) -> Tensor:
    gamma, zeta = STRETCH
    return (s * (zeta - gamma) + gamma).clamp(0, 1)
