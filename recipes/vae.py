"""The autoencoder: 64x64 RGB to 16x16 latents of 4 channels."""

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from . import state

BATCH = 32
KL_WEIGHT = 1e-4  # only to keep the latents smooth


def new_vae() -> AutoencoderKL:
    """A randomly initialised autoencoder of SDXL's class, 4x downsampling."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        force_upcast=False,
    )


def train(images: torch.Tensor, folder: Path, steps: int, device: str, seed: int = 0):
    """Fit the autoencoder to `images` (uint8, (n, 3, 64, 64)); resumes from `folder`."""
    torch.manual_seed(seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = lambda step: min(1.0, (step + 1) / 100) * max(0.02, 1 - step / steps)  # noqa: E731
    start = state.load(folder / "vae.safetensors", {"vae": vae}, optimizer)
    clock, total = time.monotonic(), 0.0
    for step in range(start, steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = images[torch.randint(len(images), (BATCH,), generator=draw)].to(device)
        pixels = (batch.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(BATCH, 4, 16, 16, generator=draw).to(device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(step)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        decoded = decoded.float()
        error = F.mse_loss(decoded, pixels)
        loss = error + 0.3 * F.l1_loss(decoded, pixels) + KL_WEIGHT * posterior.kl().mean() / 1024
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        total += error.item()
        if (step + 1) % 50 == 0:
            state.log(folder / "vae.jsonl", step=step + 1, mse=total / 50, seconds=time.monotonic() - clock)
            total = 0.0
        if (step + 1) % 250 == 0 or step + 1 == steps:
            state.save(folder / "vae.safetensors", step + 1, {"vae": vae}, optimizer)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Posterior means of all images, float32 (n, 4, 16, 16), unscaled."""
    device = vae.device
    batches = [vae.encode(b.to(device).float() / 127.5 - 1).latent_dist.mean.cpu() for b in images.split(64)]
    return torch.cat(batches).contiguous()
