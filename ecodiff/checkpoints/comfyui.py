"""Export for ComfyUI: the denoiser in the layout of the original authors, with what its node must know.

The node is in integrations/comfyui. One .safetensors file: tensors as ComfyUI names them, and in the header
"ecodiff_comfyui", JSON: {"format": 1, "model": class of comfy.supported_models, "config": its configuration,
"heads": {attention: heads that stay}, "norm_groups": of every GroupNorm, "basis": True if all modulation
reads a projected embedding}.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedModelError
from ..pipelines import denoiser_of
from ..pruning.heads import fill_heads_
from ..pruning.slicing import plan_of, shared_copy
from ..storage import write_tensors
from ..units import BASIS
from .export import format

HEADER = "ecodiff_comfyui"
FORMAT = 1

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    BASIS: BASIS,
}
# Of a double block and of a single one; a list is concatenated in that order.
DOUBLE: dict[str, list[str]] = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
SINGLE: dict[str, list[str]] = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
}
SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def unet_names(unet: Any) -> Iterator[tuple[str, str]]:
    """(diffusers' name of a module, ComfyUI's) of a UNet; a module's parameters keep their names."""
    yield from UNET.items()
    blocks, at = unet.config, 1
    for level, down in enumerate(unet.down_blocks):
        for index in range(blocks.layers_per_block):
            yield f"down_blocks.{level}.resnets.{index}", f"input_blocks.{at}.0"
            yield f"down_blocks.{level}.attentions.{index}", f"input_blocks.{at}.1"
            at += 1
        if down.downsamplers:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{at}.0.op"
            at += 1
    at = 0
    for level, up in enumerate(unet.up_blocks):
        for index in range(blocks.layers_per_block + 1):
            yield f"up_blocks.{level}.resnets.{index}", f"output_blocks.{at}.0"
            yield f"up_blocks.{level}.attentions.{index}", f"output_blocks.{at}.1"
            at += 1
        if up.upsamplers:
            place = 2 if getattr(up, "attentions", None) else 1
            yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{at - 1}.{place}.conv"


def unet_tensors(unet: nn.Module) -> dict[str, Tensor]:
    """A UNet's tensors under ComfyUI's names."""
    names, found = dict(unet_names(unet)), {}
    for name, tensor in unet.state_dict().items():
        place = max((old for old in names if name.startswith(f"{old}.")), key=len, default=None)
        if place is None:
            raise UnsupportedModelError(f"ComfyUI's UNet has no place for {name}.")
        rest = name.removeprefix(f"{place}.")
        if ".resnets." in place:
            layer, _, leaf = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{leaf}"
        found[f"{names[place]}.{rest}"] = tensor
    return found


def unet_config(unet: Any) -> dict:
    """The configuration that comfy.supported_models takes for a UNet, of its dense shapes."""
    config = unet.config
    widths, per_level = list(config.block_out_channels), config.layers_per_block
    levels = len(widths)
    depths = config.transformer_layers_per_block
    depths = [depths] * levels if isinstance(depths, int) else list(depths)
    heads = config.num_attention_heads or config.attention_head_dim
    heads = [heads] * levels if isinstance(heads, int) else list(heads)
    crossed = ["CrossAttn" in name for name in config.down_block_types]
    up = list(reversed(["CrossAttn" in name for name in config.up_block_types]))
    features = {width // count for width, count in zip(widths, heads, strict=True)}
    found = {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": widths[0],
        "num_res_blocks": [per_level] * levels,
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [d * c for d, c in zip(depths, crossed, strict=True) for _ in range(per_level)],
        "transformer_depth_output": [
            d * c for d, c in zip(depths, up, strict=True) for _ in range(per_level + 1)
        ],
        "transformer_depth_middle": depths[-1],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.use_linear_projection),
        "context_dim": config.cross_attention_dim,
        "adm_in_channels": config.projection_class_embeddings_input_dim,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "legacy": False,
    }
    found |= {"num_head_channels": features.pop()} if len(features) == 1 else {"num_heads": heads[0]}
    return found | ({"num_classes": "sequential"} if config.addition_embed_type == "text_time" else {})


def flux_tensors(transformer: Any) -> dict[str, Tensor]:
    """FLUX.1's tensors under ComfyUI's names; rows of the modulation that were removed are zeros."""
    found: dict[str, Tensor] = {}

    def put(name: str, modules: list[nn.Module]) -> None:
        parts = [_whole(module) for module in modules]
        for leaf in parts[0]:
            found[f"{name}.{leaf}"] = torch.cat([part[leaf] for part in parts])

    modules = dict(transformer.named_modules())
    for old, new in FLUX.items():
        if old in modules:
            put(new, [modules[old]])
    for leaf in ("weight", "bias"):  # the last norm takes its shift first, where diffusers' takes its scale
        name = f"final_layer.adaLN_modulation.1.{leaf}"
        found[name] = torch.cat(found[name].chunk(2)[::-1])
    for inside, layers, norms, prefix in (
        ("transformer_blocks", DOUBLE, DOUBLE_NORMS, "double_blocks"),
        ("single_transformer_blocks", SINGLE, SINGLE_NORMS, "single_blocks"),
    ):
        for index in range(len(getattr(transformer, inside))):
            at, to = f"{inside}.{index}", f"{prefix}.{index}"
            for new, olds in layers.items():
                put(f"{to}.{new}", [modules[f"{at}.{old}"] for old in olds])
            for new, old in norms.items():
                found[f"{to}.{new}.scale"] = modules[f"{at}.{old}"].weight
    found.pop(f"{BASIS}.lift", None)
    return found


def _whole(module: nn.Module) -> dict[str, Tensor]:
    """A layer's tensors, its removed rows filled with zeros where it scatters what it computes."""
    tensors: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    rows = getattr(module, "rows", None)
    if rows is None:
        return tensors
    empty = {name: t.new_zeros(module.width, *t.shape[1:]) for name, t in tensors.items()}  # type: ignore
    return {name: empty[name].index_copy(0, rows, tensor) for name, tensor in tensors.items()}


def flux_config(transformer: Any) -> dict:
    """The configuration that comfy.supported_models takes for FLUX.1, of its dense shapes."""
    config = transformer.config
    return {
        "image_model": "flux",
        "in_channels": config.in_channels // 4,
        "out_channels": (config.out_channels or config.in_channels) // 4,
        "patch_size": 2,
        "vec_in_dim": config.pooled_projection_dim,
        "context_in_dim": config.joint_attention_dim,
        "hidden_size": config.num_attention_heads * config.attention_head_dim,
        "mlp_ratio": 4.0,
        "num_heads": config.num_attention_heads,
        "depth": config.num_layers,
        "depth_single_blocks": config.num_single_layers,
        "axes_dim": list(config.axes_dims_rope),
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": config.guidance_embeds,
    }


def described(pipe: DiffusionPipeline) -> tuple[dict[str, Tensor], dict]:
    """(tensors, header) of a pruned pipeline's denoiser.

    Raises:
        UnsupportedModelError: it is none of SD 1.5, SDXL and FLUX.1, or it is not pruned.
    """
    if plan_of(denoiser_of(pipe)) is None:
        raise UnsupportedModelError(
            f"This {type(denoiser_of(pipe)).__name__} is not pruned; ComfyUI opens it as it is."
        )
    denoiser: Any = fill_heads_(shared_copy(denoiser_of(pipe)))
    name = type(denoiser).__name__.removeprefix("Sliced")
    if name == "FluxTransformer2DModel":
        model = "Flux" if denoiser.config.guidance_embeds else "FluxSchnell"
        heads = {f"double_blocks.{i}": b.attn.heads for i, b in enumerate(denoiser.transformer_blocks)}
        heads |= {
            f"single_blocks.{i}": b.attn.heads for i, b in enumerate(denoiser.single_transformer_blocks)
        }
        header = {"model": model, "config": flux_config(denoiser), "heads": heads}
        return flux_tensors(denoiser), header | {"basis": hasattr(denoiser, BASIS)}
    sdxl = getattr(denoiser.config, "addition_embed_type", None) == "text_time"
    if name != "UNet2DConditionModel" or not (sdxl or denoiser.config.cross_attention_dim == 768):
        raise UnsupportedModelError(
            f"ecodiff's ComfyUI node knows SD 1.5, SDXL and FLUX.1, not {name} of this kind. "
            "Export it as a dense-shaped model (--format dense), which ComfyUI opens by itself."
        )
    tensors, places = unet_tensors(denoiser), dict(unet_names(denoiser))
    heads = {}
    for path, module in denoiser.named_modules():
        if path.endswith((".attn1", ".attn2")):
            place = next(old for old in places if path.startswith(f"{old}."))
            heads[places[place] + path.removeprefix(place)] = module.heads
    if getattr(pipe.scheduler.config, "prediction_type", "") == "v_prediction":
        tensors["v_pred"] = torch.empty(0)  # what ComfyUI looks for
    header = {"model": "SDXL" if sdxl else "SD15", "config": unet_config(denoiser), "heads": heads}
    return tensors, header | {"norm_groups": denoiser.config.norm_num_groups}


@format("comfyui", "one file for ecodiff's ComfyUI node (SD 1.5, SDXL, FLUX.1): small and fast there too")
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
