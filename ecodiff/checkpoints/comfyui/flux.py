"""FLUX.1 in the layout of the original authors."""

from typing import Any

from torch import Tensor

from ...units import BASIS
from .layout import Layout, joined

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
BLOCKS = (
    ("transformer_blocks", "double_blocks", DOUBLE),
    ("single_transformer_blocks", "single_blocks", SINGLE),
)


def layers(transformer: Any) -> dict[str, list[str]]:
    """`Layout.layers`."""
    found = {new: [old] for old, new in FLUX.items()}
    for blocks, prefix, inside in BLOCKS:
        for index in range(len(getattr(transformer, blocks))):
            for new, olds in inside.items():
                found[f"{prefix}.{index}.{new}"] = [f"{blocks}.{index}.{old}" for old in olds]
    return found


def tensors(transformer: Any) -> dict[str, Tensor]:
    """`Layout.tensors`."""
    found = joined(transformer, LAYOUT)
    modules = dict(transformer.named_modules())
    for (blocks, prefix, _), norms in zip(BLOCKS, (DOUBLE_NORMS, SINGLE_NORMS), strict=True):
        for index in range(len(getattr(transformer, blocks))):
            for new, old in norms.items():
                found[f"{prefix}.{index}.{new}.scale"] = modules[f"{blocks}.{index}.{old}"].weight
    return found


def configuration(transformer: Any) -> dict:
    """What comfy.supported_models takes for FLUX.1, of its dense shapes."""
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


def header(transformer: Any) -> dict:
    """`Layout.header`."""
    heads = {f"double_blocks.{i}": block.attn.heads for i, block in enumerate(transformer.transformer_blocks)}
    heads |= {
        f"single_blocks.{i}": block.attn.heads
        for i, block in enumerate(transformer.single_transformer_blocks)
    }
    return {
        "model": "Flux" if transformer.config.guidance_embeds else "FluxSchnell",
        "config": configuration(transformer),
        "heads": heads,
        "basis": hasattr(transformer, BASIS),
    }


# The last norm takes its shift first, where diffusers' takes its scale.
LAYOUT = Layout(layers, tensors, header, lambda transformer: ("final_layer.adaLN_modulation.1",))
