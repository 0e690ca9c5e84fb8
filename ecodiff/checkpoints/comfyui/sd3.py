"""SD 3 and SD 3.5 in the layout of the original authors (MMDiT)."""

from typing import Any

from torch import Tensor

from ...errors import UnsupportedModelError
from ...units import BASIS
from .layout import Layout, joined

HEAD = 64  # features of every head in the original code

SD3 = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    BASIS: BASIS,
}
# Of a block; a list is concatenated in that order.
BLOCK: dict[str, list[str]] = {
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "x_block.mlp.fc1": ["ff.net.0.proj"],
    "x_block.mlp.fc2": ["ff.net.2"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"],
    "context_block.mlp.fc2": ["ff_context.net.2"],
}
NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}


def _inside(transformer: Any, layers: dict[str, Any]) -> dict[str, Any]:
    """{original name: diffusers'} of what the blocks have of `layers`."""
    found = {}
    for index in range(len(transformer.transformer_blocks)):
        for new, old in layers.items():
            olds = [f"transformer_blocks.{index}.{name}" for name in ([old] if isinstance(old, str) else old)]
            found[f"joint_blocks.{index}.{new}"] = olds
    modules = dict(transformer.named_modules())
    return {new: olds for new, olds in found.items() if olds[0] in modules}


def layers(transformer: Any) -> dict[str, list[str]]:
    """`Layout.layers`."""
    return {new: [old] for old, new in SD3.items()} | _inside(transformer, BLOCK)


def tensors(transformer: Any) -> dict[str, Tensor]:
    """`Layout.tensors`."""
    found = joined(transformer, LAYOUT)
    modules = dict(transformer.named_modules())
    for new, (old,) in _inside(transformer, NORMS).items():
        if (weight := getattr(modules[old], "weight", None)) is not None:
            found[f"{new}.weight"] = weight
    found["pos_embed"] = transformer.pos_embed.pos_embed
    # An attention without heads gets one of zeros: it gives the output layer's bias, as it should.
    for name, tensor in list(found.items()):
        if ".attn" in name and tensor.numel() == 0:
            shape = (3 * HEAD, *tensor.shape[1:]) if ".qkv." in name else (len(tensor), HEAD)
            found[name] = tensor.new_zeros(shape)
    return found


def configuration(transformer: Any) -> dict:
    """What comfy.supported_models takes for SD 3, of its dense shapes."""
    config = transformer.config
    if config.attention_head_dim != HEAD:
        raise UnsupportedModelError(
            f"ComfyUI knows SD 3 with heads of {HEAD} features, not of {config.attention_head_dim}. "
            "Export it as a dense-shaped model (--format dense)."
        )
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "patch_size": config.patch_size,
        "depth": config.num_attention_heads,  # the original code derives the width from it
        "num_blocks": config.num_layers,
        "input_size": None,
        "adm_in_channels": config.pooled_projection_dim,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {
                "in_features": config.joint_attention_dim,
                "out_features": config.caption_projection_dim,
            },
        },
        "num_patches": config.pos_embed_max_size**2,
        "pos_embed_max_size": config.pos_embed_max_size,
        "pos_embed_scaling_factor": None,
        "qk_norm": "rms" if config.qk_norm == "rms_norm" else None,
        "x_block_self_attn_layers": list(config.dual_attention_layers),
    }


def header(transformer: Any) -> dict:
    """`Layout.header`."""
    heads = {}
    for index, block in enumerate(transformer.transformer_blocks):
        heads[f"joint_blocks.{index}.x_block.attn"] = max(block.attn.heads, 1)
        if getattr(block, "attn2", None) is not None:
            heads[f"joint_blocks.{index}.x_block.attn2"] = max(block.attn2.heads, 1)
    return {
        "model": "SD3",
        "config": configuration(transformer),
        "heads": heads,
        "basis": hasattr(transformer, BASIS),
    }


def swapped(transformer: Any) -> tuple[str, ...]:
    """Where diffusers' norm takes its scale first: the last one, and that of the text in the last block."""
    last = len(transformer.transformer_blocks) - 1
    return "final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"


LAYOUT = Layout(layers, tensors, header, swapped)
