"""Which layout each denoiser of diffusers has; that of a new one is added here."""

from torch import nn

from . import flux, qwen, sd3, unet, zimage
from .layout import Layout

LAYOUTS = {
    "UNet2DConditionModel": unet.LAYOUT,
    "FluxTransformer2DModel": flux.LAYOUT,
    "SD3Transformer2DModel": sd3.LAYOUT,
    "QwenImageTransformer2DModel": qwen.LAYOUT,
    "ZImageTransformer2DModel": zimage.LAYOUT,
}


def layout_of(denoiser: nn.Module) -> Layout | None:
    """The layout of a denoiser, dense or sliced; None of a class that has none here."""
    return LAYOUTS.get(type(denoiser).__name__.removeprefix("Sliced"))
