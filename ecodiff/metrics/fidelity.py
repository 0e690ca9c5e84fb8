"""How close a pruned model is to its dense one: same prompt, same noise."""

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from ..config import check_seed
from ..errors import BudgetError
from ..machine import wait_for
from ..pipelines import call_options, denoiser_of
from .cost import parameters, peak_of


@dataclass(frozen=True)
class Sample:
    """One generated image.

    Attributes:
        latents: z_0, float32, on the CPU.
        milliseconds: that the whole image took.
        step_milliseconds: median of its time steps; that of the image if there was only one.
        peak_bytes: what the pipeline needed on its device at most; None where nobody counts them.
        speedup: of its denoiser over the dense one's, as `cost.speedup` gives it; None: not measured.
    """

    image: Image.Image
    latents: Tensor
    milliseconds: float
    step_milliseconds: float = 0.0
    peak_bytes: int | None = None
    speedup: tuple[float, float, float] | None = None


def generate(
    pipe: DiffusionPipeline,
    prompt: str,
    seed: int,
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    extra: dict | None = None,
    on_step=None,
) -> Sample:
    """Generate one image. The noise depends on the seed only, so variants can be compared.

    Args:
        extra: more arguments of the pipeline's call.
        on_step: called with the number of finished time steps; raise in it to stop.

    Raises:
        BudgetError: the pipeline does not take these steps, this guidance or this size.
    """
    check_seed(seed)
    if steps is not None and steps < 1:
        raise BudgetError(f"{steps} time steps cannot be drawn; give at least 1.")
    latents, ends, device = {}, [], denoiser_of(pipe).device

    def keep(pipe: DiffusionPipeline, index, timestep, kwargs):
        latents["z"] = kwargs["latents"]
        wait_for(device)
        ends.append(time.perf_counter())
        if on_step is not None:
            on_step(index + 1)
        return kwargs

    def keep_old(index, timestep, z):  # PixArt's pipelines still have diffusers' first kind of callback
        keep(pipe, index, timestep, {"latents": z})

    options = call_options(pipe, steps, guidance_scale, size, extra)
    if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
        options["callback_on_step_end"] = keep
    else:
        options |= {"callback": keep_old, "callback_steps": 1}
    generator, peak = torch.Generator().manual_seed(seed), peak_of(pipe)
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            output = pipe(prompt=prompt, generator=generator, output_type="pil", **options)
    except ValueError as error:
        raise BudgetError(f"{type(pipe).__name__} cannot draw with these settings: {error}") from None
    elapsed = 1000 * (time.perf_counter() - start)
    images = output.images if hasattr(output, "images") else output.frames[0]  # of a video, the first
    each = [1000 * (end - begun) for begun, end in pairwise(ends)]
    z0 = latents["z"].float().cpu().clone()
    return Sample(images[0], z0, elapsed, median(each or [elapsed]), peak())


@dataclass(frozen=True)
class Fidelity:
    """Of one pair of images.

    Attributes:
        latent_error: ||z_0 - z_0'||^2 over the dense latent's variance, a mean over elements.
        psnr: of the RGB images, in dB.
        ssim: of the RGB images, 1 if equal (Wang et al. 2004).
    """

    latent_error: float
    psnr: float
    ssim: float


def latent_error(dense: Tensor, pruned: Tensor) -> float:
    """Mean squared difference of two final latents, relative to the dense one's variance."""
    return float((dense - pruned).square().mean() / dense.var())


def fidelity(dense: Sample, pruned: Sample) -> Fidelity:
    """Compare two samples of the same prompt and seed."""
    a, b = (
        torch.from_numpy(np.asarray(s.image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)[None]
        for s in (dense, pruned)
    )
    return Fidelity(
        latent_error(dense.latents, pruned.latents),
        min(99.0, float(peak_signal_noise_ratio(b, a, data_range=1.0))),
        float(structural_similarity_index_measure(b, a, data_range=1.0)),  # type: ignore[arg-type]
    )


def compare(
    pipe: DiffusionPipeline,
    small: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    size: int | None = None,
    extra: dict | None = None,
    on_image: Callable[[], object] = lambda: None,
) -> dict:
    """Fidelity and speed of a pruned pipeline against the dense one, as plain data.

    Args:
        on_image: called after every image of a pair.

    Returns:
        {"mean": {latent_error, psnr, ssim}, "rows": one dict a prompt and seed, "params_dense",
        "params_pruned", "ms_dense", "ms_pruned": median milliseconds an image, "step_ms_dense",
        "step_ms_pruned": of a time step}
    """
    if not prompts or not seeds:
        raise BudgetError("Comparing needs at least one prompt and one seed.")
    options: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "size": size, "extra": extra}
    for warm in (pipe, small):
        generate(warm, prompts[0], 0, **options)
    rows, times = [], []
    for prompt in prompts:
        for seed in seeds:
            dense = generate(pipe, prompt, seed, **options)
            on_image()
            pruned = generate(small, prompt, seed, **options)
            on_image()
            rows.append({"prompt": prompt, "seed": seed, **asdict(fidelity(dense, pruned))})
            each = (dense.step_milliseconds, pruned.step_milliseconds)
            times.append((dense.milliseconds, pruned.milliseconds, *each))
    measures = ("latent_error", "psnr", "ssim")
    names = ("ms_dense", "ms_pruned", "step_ms_dense", "step_ms_pruned")
    return {
        "mean": {name: float(np.mean([row[name] for row in rows])) for name in measures},
        "params_dense": parameters(denoiser_of(pipe)),
        "params_pruned": parameters(denoiser_of(small)),
        **{name: median(values) for name, values in zip(names, zip(*times, strict=True), strict=True)},
        "rows": rows,
    }
