"""Qwen-Image: ComfyUI names its layers as diffusers does."""

from typing import Any

from torch import Tensor

from ...errors import UnsupportedModelError
from ...units import BASIS
from .layout import Layout, unknown, whole


def tensors(transformer: Any) -> dict[str, Tensor]:
    """`Layout.tensors`."""
    found: dict[str, Tensor] = {}
    for path, module in transformer.named_modules():
        found |= {f"{path}.{leaf}": tensor for leaf, tensor in whole(module).items()}
    found.pop(f"{BASIS}.lift", None)
    return found


def header(transformer: Any) -> dict:
    """`Layout.header`. Raises UnsupportedModelError for models of this class that ComfyUI has otherwise."""
    config = transformer.config
    variants = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond")  # other models of this class
    if any(getattr(config, name, False) for name in variants):
        raise UnsupportedModelError(unknown(transformer))
    names = (
        "patch_size",
        "in_channels",
        "out_channels",
        "num_layers",
        "attention_head_dim",
        "num_attention_heads",
        "joint_attention_dim",
    )
    return {
        "model": "QwenImage",
        "config": {name: config[name] for name in names}
        | {"image_model": "qwen_image", "axes_dims_rope": list(config.axes_dims_rope)},
        "heads": {
            f"transformer_blocks.{i}.attn": block.attn.heads
            for i, block in enumerate(transformer.transformer_blocks)
        },
        "basis": hasattr(transformer, BASIS),
    }


LAYOUT = Layout(lambda transformer: {}, tensors, header)
