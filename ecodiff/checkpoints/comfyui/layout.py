"""How a denoiser's layers are named and joined by its original authors, and by ComfyUI."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...units import BASIS


@dataclass(frozen=True)
class Layout:
    """A denoiser's layers in their original authors' layout; each function takes diffusers' denoiser.

    Attributes:
        layers: {original layer: diffusers' layers, in the order in which they are concatenated}.
        tensors: the state dict under original names.
        header: what the node must know: class of comfy.supported_models, its configuration, heads.
        swapped: original layers whose halves, shift and scale, change places.
    """

    layers: Callable[[Any], dict[str, list[str]]]
    tensors: Callable[[Any], dict[str, Tensor]]
    header: Callable[[Any], dict]
    swapped: Callable[[Any], tuple[str, ...]] = lambda denoiser: ()


def whole(module: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors, its removed rows filled with zeros where it scatters what it computes."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    rows = getattr(module, "rows", None)
    if rows is None:
        return tensors
    empty = {name: t.new_zeros(module.width, *t.shape[1:]) for name, t in tensors.items()}  # type: ignore
    return {name: empty[name].index_copy(0, rows, tensor) for name, tensor in tensors.items()}


def joined(denoiser: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The tensors of `layout.layers`, under original names; removed rows of the modulation are zeros."""
    modules, found = dict(denoiser.named_modules()), {}
    for name, olds in layout.layers(denoiser).items():
        parts = [whole(modules[old]) for old in olds if old in modules]
        for leaf in parts[0] if parts else ():
            found[f"{name}.{leaf}"] = torch.cat([part[leaf] for part in parts])
    for name in layout.swapped(denoiser):
        for leaf in ("weight", "bias"):
            found[f"{name}.{leaf}"] = torch.cat(found[f"{name}.{leaf}"].chunk(2)[::-1])
    found.pop(f"{BASIS}.lift", None)
    return found


def unknown(denoiser: nn.Module) -> str:
    """Why a denoiser has no layout, in words."""
    name = type(denoiser).__name__.removeprefix("Sliced")
    return (
        f"ecodiff's ComfyUI node knows SD 1.5, SDXL, SD 3, FLUX.1, Qwen-Image and Z-Image, not this "
        f"{name}. Export it as a dense-shaped model (--format dense), which ComfyUI opens by itself."
    )
