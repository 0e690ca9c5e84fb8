"""Size, measured."""

import torch


def parameters(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def megabytes(count: float) -> str:
    """Bytes for people: "16.2 MB", "5.14 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
