"""Export with the denoiser's weights in 8-bit integers, by torchao: half of 16 bits, opened by diffusers."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..metrics.report import in_int8
from ..pipelines import denoiser_name, denoiser_of
from .card import model_card
from .export import format
from .saving import cast, pruned_by, write

NOTE = """
The denoiser's Linears are stored in 8-bit integers, one scale a row (torchao, weight only); all else is
bfloat16. diffusers reads how from the config, and needs torchao to open it.
"""


def left_alone(denoiser: nn.Module) -> list[str]:
    """Linears that torchao cannot quantise."""
    return [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear) and not in_int8(m)]


@format(
    "int8",
    "a diffusers folder with the denoiser in 8-bit integers (torchao): half the size of 16 bits",
    "torchao",
)
def save_int8(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline whose denoiser's Linears are quantised by torchao, in safetensors.

    Args:
        dtype: not used: what is not quantised is bfloat16.

    Raises:
        CheckpointError: as `checkpoints.saving.save`.
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    name, plan = denoiser_name(pipe), pruned_by(pipe)
    small: Any = cast(pipe, torch.bfloat16)  # a copy
    denoiser: Any = denoiser_of(small)
    how = TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left_alone(denoiser) or None)
    with TemporaryDirectory() as folder:  # diffusers quantises what it opens, and no model in memory
        denoiser.save_pretrained(folder)
        quantised = type(denoiser).from_pretrained(
            folder, quantization_config=how, torch_dtype=torch.bfloat16
        )
    small.register_modules(**{name: quantised})
    return write(small, out, plan, (card or model_card(pipe, dtype="bfloat16")).rstrip() + "\n" + NOTE)
