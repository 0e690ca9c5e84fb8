"""Pipelines of true size with random weights, for what does not depend on what the weights say.

The denoiser is the published one, in bfloat16. Text encoders have its widths but one layer each, and the
autoencoder is tiny: neither is pruned, and neither runs while the denoiser is measured.
"""

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionXLPipeline,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ecodiff.catalog import EMBEDDED
from ecodiff.checkpoints import loading

HALF = torch.bfloat16


def pipeline(name: str, device: str = "cpu", vae_blocks: int = 4):
    """The pipeline of "sdxl" or of "flux-dev".

    Args:
        vae_blocks: latents are 2 ** (vae_blocks - 1) times smaller than images.
    """
    return {"sdxl": _sdxl, "flux-dev": _flux}[name](device, vae_blocks).to(device)


def _denoiser(name: str, device: str) -> nn.Module:
    """Every weight random, none in float32 on the way."""
    denoiser = loading.empty_denoiser(name).to(HALF).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(0)
    for path, parameter in denoiser.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float(not path.endswith("bias")))
    return denoiser


def _vae(blocks: int, latents: int) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks,
        norm_num_groups=4,
        latent_channels=latents,
    )
    return vae.to(HALF).eval()


def _clip(cls, tokenizer, width: int, **more) -> nn.Module:
    shape = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": width // 64}
    shape |= {"num_hidden_layers": 1, "max_position_embeddings": tokenizer.model_max_length}
    return cls(CLIPTextConfig(vocab_size=len(tokenizer), **shape, **more)).to(HALF).eval()


def _sdxl(device: str, vae_blocks: int) -> StableDiffusionXLPipeline:
    tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-sdxl" / "tokenizer")
    return StableDiffusionXLPipeline(
        vae=_vae(vae_blocks, 4),
        text_encoder=_clip(CLIPTextModel, tokenizer, 768),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer, 1280, projection_dim=1280),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=_denoiser("sdxl", device),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _flux(device: str, vae_blocks: int) -> FluxPipeline:
    clip = CLIPTokenizer.from_pretrained(EMBEDDED / "emoji-flux" / "tokenizer")
    tokenizer = T5Tokenizer.from_pretrained(EMBEDDED / "emoji-flux" / "tokenizer_2")
    transformer = _denoiser("flux-dev", device)
    width = transformer.config.joint_attention_dim
    shape = {"d_model": width, "d_kv": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    return FluxPipeline(
        vae=_vae(vae_blocks, 16),
        text_encoder=_clip(CLIPTextModel, clip, transformer.config.pooled_projection_dim),
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **shape)).to(HALF).eval(),
        tokenizer=clip,
        tokenizer_2=tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
