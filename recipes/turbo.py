"""emoji-turbo: emoji-sdxl distilled to four steps, a latent consistency model (arXiv 2310.04378).

The student learns to say, of every point of the teacher's guided trajectory, where it ends. The
teacher's guidance is baked in, so a step is one call. LCMScheduler samples from it.
"""

import copy
from pathlib import Path

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from . import data, training
from .sdxl import TOKENS, Denoiser, levels

GUIDANCE = 3.0
GRID = 20  # LCMScheduler's original_inference_steps: time steps 49, 99, ..., 999
PEAK_RATE = 5e-4
HUBER = 0.02  # where the loss turns from a square to a distance: 5e-4 sqrt(latent size)


def new_pipeline(teacher: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """The teacher's pipeline, sampled as a consistency model."""
    settings = {"original_inference_steps": GRID, "timestep_spacing": "leading"}
    scheduler = LCMScheduler.from_config(teacher.scheduler.config, **settings)
    return StableDiffusionXLPipeline(**teacher.components | {"scheduler": scheduler}, add_watermarker=False)


def train(pipe, latents: Tensor, emojis: list[data.Emoji], folder: Path, steps: int, device: str) -> Denoiser:
    """Consistency distillation of the pipeline's UNet on scaled `latents`; resumes from `folder`.

    A step noises images to a time of the grid, lets the teacher take one guided DDIM step down the
    grid (their section 4.3), and draws the student's answer before that step towards its answer
    after it. As in arXiv 2310.14189 the target is the student itself, not an average of it, and the
    distance is pseudo-Huber.
    """
    teacher = Denoiser(pipe).to(device).eval().requires_grad_(False)
    teacher.unet.to(memory_format=torch.channels_last)
    student = copy.deepcopy(teacher)
    student.unet.requires_grad_(True)
    scheduler, alphas = pipe.scheduler, pipe.scheduler.alphas_cumprod.to(device)
    spacing = scheduler.config.num_train_timesteps // GRID
    captions, tokens = training.Captions(emojis), training.tokens(pipe.tokenizer, emojis, TOKENS)

    def answer(noisy: Tensor, times: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        signal, spread = levels(alphas, times)
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(times.view(-1, 1, 1, 1))
        return skip * noisy + out * (signal * noisy - spread * student(noisy, times, *text).float())

    @torch.no_grad()
    def stepped(noisy: Tensor, times: Tensor, later: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        empty = tuple(torch.zeros_like(states) for states in text)
        velocity = teacher(noisy, times, *empty).lerp(teacher(noisy, times, *text), GUIDANCE).float()
        (signal, spread), (next_signal, next_spread) = levels(alphas, times), levels(alphas, later)
        clean, noise = signal * noisy - spread * velocity, spread * noisy + signal * velocity
        return next_signal * clean + next_spread * noise

    def loss_of(draw: torch.Generator) -> Tensor:
        rows, aliased, _ = captions.draw(draw)
        times = torch.randint(1, GRID + 1, (len(rows),), generator=draw) * spacing - 1
        noise = torch.randn(len(rows), *latents.shape[1:], generator=draw).to(device)
        clean, times = latents[rows].to(device), times.to(device)
        later = (times - spacing).clamp_min(0)
        signal, spread = levels(alphas, times)
        noisy = signal * clean + spread * noise
        with torch.no_grad():
            text = teacher.text(tokens[aliased.long(), rows].to(device))
            target = answer(stepped(noisy, times, later, text), later, text)
        square = (answer(noisy, times, text) - target).square().sum((1, 2, 3))
        return ((square + HUBER**2).sqrt() - HUBER).mean()

    return training.fit(student, loss_of, folder, "student", steps, device, peak_rate=PEAK_RATE)
