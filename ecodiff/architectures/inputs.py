"""What a denoiser is called with, as its pipeline does it at a size: tensors on the meta device.

Of classes that are not here, nothing is known without a pipeline. Text lengths are the pipelines' own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import device_of

BUILDERS: dict[str, Callable[[Any, int, int], dict]] = {}


def _called(*classes: str):
    def register(builder: Callable[[Any, int, int], dict]):
        BUILDERS.update(dict.fromkeys(classes, builder))
        return builder

    return register


def meta_call(denoiser: nn.Module, size: int, rows: int) -> dict | None:
    """Arguments of one call; None for a class that is not known.

    Args:
        denoiser: on the meta device; it fixes the dtype.
        size: pixels a side (of a video: its height, and one frame, as ecodiff draws it).
        rows: images at a time, twice as many where guidance takes a second batch.
    """
    builder = BUILDERS.get(type(denoiser).__name__.removeprefix("Sliced"))
    if builder is None:
        return None
    given = builder(denoiser.config, size, rows)
    dtype = next(denoiser.parameters()).dtype
    return {name: _cast(value, dtype) for name, value in given.items()}


@contextmanager
def evenly_routed(denoiser: nn.Module) -> Iterator[None]:
    """Let experts (HiDream's) be called on the meta device: as if each got an equal share of the tokens."""
    meta = device_of(denoiser).type == "meta"
    routed: list[Any] = [m for m in denoiser.modules() if meta and hasattr(m, "moe_infer")]
    for module in routed:
        module.forward = partial(_evenly, module)
    before = denoiser.training
    denoiser.training = before or bool(routed)  # otherwise it reads the images' sizes off a tensor
    try:
        yield
    finally:
        denoiser.training = before
        for module in routed:
            del module.forward


def _evenly(module: Any, x: Tensor) -> Tensor:
    _, weights, _ = module.gate(x)
    tokens = x.flatten(0, -2).repeat_interleave(module.num_activated_experts, dim=0)
    shares = tokens.tensor_split(len(module.experts))
    found = torch.cat([expert(share) for expert, share in zip(module.experts, shares, strict=True)])
    found = (found.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(1)
    return found.view(x.shape) + module.shared_experts(x)


def _cast(value, dtype: torch.dtype):
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _cast(inner, dtype) for name, inner in value.items()}
    return [_cast(inner, dtype) for inner in value] if isinstance(value, list) else value


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


@_called("UNet2DConditionModel")
def _unet(config, size: int, rows: int) -> dict:
    given: dict[str, Any] = {
        "sample": _empty(rows, config.in_channels, size // 8, size // 8),
        "timestep": _empty(rows),
    }
    given["encoder_hidden_states"] = _empty(rows, 77, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {"text_embeds": _empty(rows, pooled), "time_ids": _empty(rows, 6)}
    return given


def _tokens(config, size: int, rows: int, text: int, axes: int) -> dict:
    image = (size // 16) ** 2
    return {
        "hidden_states": _empty(rows, image, config.in_channels),
        "encoder_hidden_states": _empty(rows, text, config.joint_attention_dim),
        "img_ids": _empty(image, axes),
        "txt_ids": _empty(text, axes),
        "timestep": _empty(rows),
    }


@_called("FluxTransformer2DModel")
def _flux(config, size: int, rows: int) -> dict:
    given = _tokens(config, size, rows, 512, 3)
    given["pooled_projections"] = _empty(rows, config.pooled_projection_dim)
    return given | ({"guidance": _empty(rows)} if config.guidance_embeds else {})


@_called("ChromaTransformer2DModel")
def _chroma(config, size: int, rows: int) -> dict:
    return _tokens(config, size, rows, 512, 3)


@_called("Flux2Transformer2DModel")
def _flux2(config, size: int, rows: int) -> dict:
    return _tokens(config, size, rows, 512, 4) | {"guidance": _empty(rows)}


@_called("SD3Transformer2DModel")
def _sd3(config, size: int, rows: int) -> dict:
    return {
        "hidden_states": _empty(rows, config.in_channels, size // 8, size // 8),
        "encoder_hidden_states": _empty(rows, 77 + 256, config.joint_attention_dim),
        "pooled_projections": _empty(rows, config.pooled_projection_dim),
        "timestep": _empty(rows),
    }


@_called("QwenImageTransformer2DModel")
def _qwen(config, size: int, rows: int) -> dict:
    side, text = size // 16, 128
    return {
        "hidden_states": _empty(rows, side * side, config.in_channels),
        "encoder_hidden_states": _empty(rows, text, config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.empty(rows, text, device="meta", dtype=torch.bool),
        "timestep": _empty(rows),
        "img_shapes": [[(1, side, side)]] * rows,
    }


@_called("PixArtTransformer2DModel")
def _pixart(config, size: int, rows: int) -> dict:
    return {
        "hidden_states": _empty(rows, config.in_channels, size // 8, size // 8),
        "encoder_hidden_states": _empty(rows, 300, config.caption_channels),
        "timestep": _empty(rows),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@_called("SanaTransformer2DModel")
def _sana(config, size: int, rows: int) -> dict:
    given = {
        "hidden_states": _empty(rows, config.in_channels, size // 32, size // 32),
        "encoder_hidden_states": _empty(rows, 300, config.caption_channels),
        "timestep": _empty(rows),
    }
    return given | ({"guidance": _empty(rows)} if config.guidance_embeds else {})


@_called("ZImageTransformer2DModel")
def _z_image(config, size: int, rows: int) -> dict:
    return {
        "x": [_empty(config.in_channels, 1, size // 8, size // 8) for _ in range(rows)],
        "t": _empty(rows),
        "cap_feats": [_empty(128, config.cap_feat_dim) for _ in range(rows)],
    }


class _Ones(Tensor):
    """A mask of ones on the meta device, which can be counted."""

    def sum(self, dim: int) -> Tensor:  # type: ignore[override]
        return torch.full((len(self),), self.shape[dim])


@_called("Lumina2Transformer2DModel")
def _lumina(config, size: int, rows: int) -> dict:
    text = 256
    return {
        "hidden_states": _empty(rows, config.in_channels, size // 8, size // 8),
        "encoder_hidden_states": _empty(rows, text, config.cap_feat_dim),
        "encoder_attention_mask": torch.empty(rows, text, device="meta", dtype=torch.bool).as_subclass(_Ones),
        "timestep": _empty(rows),
    }


@_called("HiDreamImageTransformer2DModel")
def _hidream(config, size: int, rows: int) -> dict:
    text, llama = 128, max(config.llama_layers) + 1
    return {
        "hidden_states": _empty(rows, config.in_channels, size // 8, size // 8),
        "timesteps": _empty(rows),
        "encoder_hidden_states_t5": _empty(rows, text, config.caption_channels[0]),
        "encoder_hidden_states_llama3": _empty(llama, rows, text, config.caption_channels[1]),
        "pooled_embeds": _empty(rows, config.text_emb_dim),
    }


@_called("WanTransformer3DModel")
def _wan(config, size: int, rows: int) -> dict:
    frames, wide = 1, size * 16 // 9 // 32 * 32
    pixels = 16 if config.in_channels == 48 else 8  # a latent's: Wan 2.2 5B has an autoencoder of its own
    high, wide = size // pixels, wide // pixels
    # That model is told the time step of every token.
    times = (rows, frames * (high // 2) * (wide // 2)) if pixels == 16 else (rows,)
    return {
        "hidden_states": _empty(rows, config.in_channels, frames, high, wide),
        "encoder_hidden_states": _empty(rows, 512, config.text_dim),
        "timestep": _empty(*times),
    }
