"""Rows of AdaLN modulation."""

from collections.abc import Iterator

from torch import nn

from ..units import PruneGroup, Slot, units
from .registry import Layer, adapter


@adapter
def modulation(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Rows of the Linear that turns the time embedding into shifts, scales and gates; zero if gone.

    In the AdaLayerNormZero family, and in Qwen-Image's sequences of an activation and a Linear.
    """
    name, linear = "linear", getattr(module, "linear", None)
    if path.endswith(("img_mod", "txt_mod")) and isinstance(module, nn.Sequential):
        name, linear = str(len(module) - 1), module[-1]
    elif "AdaLayerNormZero" not in type(module).__name__:
        return
    if not isinstance(linear, nn.Linear):
        return
    slot = Slot(f"{path}.{name}", "out", units(len(linear.weight)), scattered=True)
    yield PruneGroup(path, "modulation", len(linear.weight), consumers=(slot,), producers=())
