"""Z-Image in the layout that ComfyUI has it in: one layer of queries, keys and values, as Lumina 2's."""

from typing import Any

from torch import Tensor

from ...errors import UnsupportedModelError
from .layout import Layout, joined, unknown

PATCHES = "2-1"  # diffusers has an embedder and a final layer for each size of a patch; there is one
EMBEDDERS = {
    "x_embedder": f"all_x_embedder.{PATCHES}",
    "t_embedder.mlp.0": "t_embedder.mlp.0",
    "t_embedder.mlp.2": "t_embedder.mlp.2",
    "cap_embedder.1": "cap_embedder.1",
    "final_layer.linear": f"all_final_layer.{PATCHES}.linear",
    "final_layer.adaLN_modulation.1": f"all_final_layer.{PATCHES}.adaLN_modulation.1",
}
BLOCK = {
    "attention.qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
    "attention.out": ["attention.to_out.0"],
    "feed_forward.w1": ["feed_forward.w1"],
    "feed_forward.w2": ["feed_forward.w2"],
    "feed_forward.w3": ["feed_forward.w3"],
    "adaLN_modulation.0": ["adaLN_modulation.0"],  # not in the context refiner
}
NORMS = {
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}


def _blocks(transformer: Any) -> list[tuple[str, Any]]:
    names = ("noise_refiner", "context_refiner", "layers")
    return [(f"{name}.{i}", block) for name in names for i, block in enumerate(getattr(transformer, name))]


def layers(transformer: Any) -> dict[str, list[str]]:
    """`Layout.layers`."""
    found = {new: [old] for new, old in EMBEDDERS.items()}
    for path, block in _blocks(transformer):
        own = [name for name, _ in block.named_modules()]
        for new, olds in BLOCK.items():
            if olds[0] in own:
                found[f"{path}.{new}"] = [f"{path}.{old}" for old in olds]
    return found


def tensors(transformer: Any) -> dict[str, Tensor]:
    """`Layout.tensors`."""
    found = joined(transformer, LAYOUT)
    for path, block in _blocks(transformer):
        found |= {f"{path}.{new}.weight": block.get_submodule(old).weight for new, old in NORMS.items()}
    found["cap_embedder.0.weight"] = transformer.cap_embedder[0].weight
    return found | {name: getattr(transformer, name) for name in ("x_pad_token", "cap_pad_token")}


def header(transformer: Any) -> dict:
    """`Layout.header`. Raises UnsupportedModelError for models of this class that ComfyUI has otherwise."""
    config = transformer.config
    if config.siglip_feat_dim or not config.qk_norm or list(config.all_patch_size) != [2]:
        raise UnsupportedModelError(unknown(transformer))
    names = ("in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps")
    known = {name: config[name] for name in (*names, "qk_norm", "cap_feat_dim", "rope_theta")}
    known |= {name: list(config[name]) for name in ("axes_dims", "axes_lens")}
    known |= {"image_model": "lumina2", "patch_size": 2, "ffn_dim_multiplier": 8 / 3}
    known |= {"z_image_modulation": True, "time_scale": config.t_scale, "pad_tokens_multiple": 32}
    heads = {f"{path}.attention": block.attention.heads for path, block in _blocks(transformer)}
    return {"model": "ZImage", "config": known, "heads": heads}


LAYOUT = Layout(layers, tensors, header)
