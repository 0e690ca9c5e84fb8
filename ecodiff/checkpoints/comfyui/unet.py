"""UNets of SD 1.5 and SDXL in the layout of the original authors."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedModelError
from .layout import Layout, unknown

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


def names(unet: Any) -> Iterator[tuple[str, str]]:
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


def layers(unet: nn.Module) -> dict[str, list[str]]:
    """`Layout.layers`."""
    places, found = dict(names(unet)), {}
    for path, module in unet.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            place = max((old for old in places if path == old or path.startswith(f"{old}.")), key=len)
            rest = path.removeprefix(place)
            found[places[place] + (f".{RESNET[rest[1:]]}" if ".resnets." in place else rest)] = [path]
    return found


def tensors(unet: nn.Module) -> dict[str, Tensor]:
    """`Layout.tensors`."""
    places, found = dict(names(unet)), {}
    for name, tensor in unet.state_dict().items():
        place = max((old for old in places if name.startswith(f"{old}.")), key=len, default=None)
        if place is None:
            raise UnsupportedModelError(f"ComfyUI's UNet has no place for {name}.")
        rest = name.removeprefix(f"{place}.")
        if ".resnets." in place:
            layer, _, leaf = rest.rpartition(".")
            rest = f"{RESNET[layer]}.{leaf}"
        found[f"{places[place]}.{rest}"] = tensor
    return found


def depths(block: nn.Module) -> list[int]:
    """How many layers each transformer of a block has: asymmetric in SSD-1B and emoji-sdxl."""
    return [len(attention.transformer_blocks) for attention in getattr(block, "attentions", None) or ()]


def configuration(unet: Any) -> dict:
    """What comfy.supported_models takes for a UNet, of its dense shapes."""
    config = unet.config
    widths, per_level = list(config.block_out_channels), config.layers_per_block
    levels = len(widths)
    middle = depths(unet.mid_block)
    heads = config.num_attention_heads or config.attention_head_dim
    heads = [heads] * levels if isinstance(heads, int) else list(heads)
    features = {width // count for width, count in zip(widths, heads, strict=True)}
    found = {
        "image_size": 32,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "model_channels": widths[0],
        "num_res_blocks": [per_level] * levels,
        "channel_mult": [width // widths[0] for width in widths],
        "transformer_depth": [d for block in unet.down_blocks for d in depths(block) or [0] * per_level],
        "transformer_depth_output": [  # read from its end
            d for block in reversed(unet.up_blocks) for d in depths(block)[::-1] or [0] * (per_level + 1)
        ],
        "transformer_depth_middle": middle[0] if middle else -1,
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


def header(unet: Any) -> dict:
    """`Layout.header`."""
    sdxl = unet.config.addition_embed_type == "text_time"
    if not sdxl and unet.config.cross_attention_dim != 768:
        raise UnsupportedModelError(unknown(unet))
    places, heads = dict(names(unet)), {}
    for path, module in unet.named_modules():
        if path.endswith((".attn1", ".attn2")):
            place = next(old for old in places if path.startswith(f"{old}."))
            heads[places[place] + path.removeprefix(place)] = module.heads
    return {
        "model": "SDXL" if sdxl else "SD15",
        "config": configuration(unet),
        "heads": heads,
        "norm_groups": unet.config.norm_num_groups,
    }


LAYOUT = Layout(layers, tensors, header)
