"""Export for ComfyUI: the denoiser in the layout of the original authors, with what its node must know.

The node is in integrations/comfyui. One .safetensors file: tensors as ComfyUI names them, and in the header
"ecodiff_comfyui", JSON: {"format": 1, "model": class of comfy.supported_models, "config": its configuration,
"heads": {attention: heads that stay}, "norm_groups": of every GroupNorm, "basis": True if all modulation
reads a projected embedding}.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...errors import CheckpointError, UnsupportedModelError
from ...pipelines import denoiser_of
from ...pruning.heads import fill_heads_
from ...pruning.slicing import plan_of, shared_copy
from ...storage import write_tensors
from ..export import format
from .layout import unknown
from .layouts import layout_of

HEADER = "ecodiff_comfyui"
FORMAT = 1


def described(pipe: DiffusionPipeline) -> tuple[dict[str, Tensor], dict]:
    """(tensors, header) of a pruned pipeline's denoiser.

    Raises:
        UnsupportedModelError: it is none of those in `layouts`, or it is not pruned.
    """
    if plan_of(denoiser_of(pipe)) is None:
        raise UnsupportedModelError(
            f"This {type(denoiser_of(pipe)).__name__} is not pruned; ComfyUI opens it as it is."
        )
    denoiser: Any = fill_heads_(shared_copy(denoiser_of(pipe)))
    layout = layout_of(denoiser)
    if layout is None:
        raise UnsupportedModelError(unknown(denoiser))
    header, tensors = layout.header(denoiser), layout.tensors(denoiser)
    if hasattr(pipe, "unet") and getattr(pipe.scheduler.config, "prediction_type", "") == "v_prediction":
        tensors["v_pred"] = torch.empty(0)  # what ComfyUI looks for
    return tensors, header


@format(
    "comfyui",
    "one file for ecodiff's ComfyUI node (SD 1.5, SDXL, SD 3, FLUX.1, Qwen-Image, Z-Image): small and fast "
    "there too",
)
def save_comfyui(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned denoiser for integrations/comfyui. Text encoders and VAE are the dense model's.

    Args:
        out: a .safetensors file, or a folder to put it in under its own name.
        dtype: of the weights in the file; None: as they are in memory.
        card: not used: a file has none.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
        UnsupportedModelError: see `described`.
    """
    tensors, header = described(pipe)
    out = Path(out)
    file = out if out.suffix == ".safetensors" else out / f"{out.name}.safetensors"
    if file.exists():
        raise CheckpointError(f"{file} exists. Name a new folder or file.")
    tensors = {name: t.to(dtype) if dtype and t.numel() else t for name, t in tensors.items()}
    return write_tensors(file, tensors, {"format": "pt", HEADER: json.dumps({"format": FORMAT} | header)})
