"""Which layout each denoiser of diffusers has; that of a new one is added here."""

from torch import nn

from . import flux, unet
from .layout import Layout

LAYOUTS = {"UNet2DConditionModel": unet.LAYOUT, "FluxTransformer2DModel": flux.LAYOUT}


def layout_of(denoiser: nn.Module) -> Layout | None:
    return LAYOUTS.get(type(denoiser).__name__.removeprefix("Sliced"))
