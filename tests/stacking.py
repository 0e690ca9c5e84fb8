"""What people put on top of a pruned model: each entry does it, and draws.

README's table is written from STACKS by `python -m tests.support`; test_stacking.py tries every row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    FirstBlockCacheConfig,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image

from ecodiff.pipelines import denoiser_of

CPU = torch.device("cpu")
DRAW = {
    "emoji-sdxl": {"num_inference_steps": 6, "guidance_scale": 3.0, "height": 64, "width": 64},
    "emoji-flux": {"num_inference_steps": 6, "max_sequence_length": 28, "height": 64, "width": 64},
}
GREY = Image.fromarray(np.full((64, 64, 3), 200, np.uint8))
WHITE = Image.fromarray(np.full((64, 64), 255, np.uint8))


@dataclass(frozen=True)
class Stack:
    """Something on top of a pruned pipeline.

    Attributes:
        words: for the README.
        put: puts it there; returns the pipeline to draw with, and further arguments of its call.
        error: largest difference of the latents, relative to the largest latent; None: another image
            is what it is for, so only that it is one.
        models: that it is tried on.
        changes: the latents must differ from those without it, or it did nothing.
    """

    words: str
    put: Callable
    error: float | None
    models: tuple[str, ...] = ("emoji-sdxl", "emoji-flux")
    changes: bool = True


def compiled(pipe, dense):
    denoiser_of(pipe).compile(backend="aot_eager", fullgraph=True)
    return pipe, {}


def offloaded(pipe, dense):
    denoiser_of(pipe).enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
    return pipe, {}


def cast(pipe, dense):
    denoiser_of(pipe).enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return pipe, {}


def torchao_int8(pipe, dense):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser_of(pipe), Int8WeightOnlyConfig())
    return pipe, {}


def quanto_int8(pipe, dense):
    from optimum.quanto import freeze, qint8, quantize

    quantize(denoiser_of(pipe), weights=qint8)
    freeze(denoiser_of(pipe))
    return pipe, {}


def first_block_cache(pipe, dense):
    denoiser_of(pipe).enable_cache(FirstBlockCacheConfig(threshold=0.5))
    return pipe, {}


def deep_cache(pipe, dense):
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    return pipe, {}


def image_to_image(pipe, dense):
    return AutoPipelineForImage2Image.from_pipe(pipe), {"image": GREY, "strength": 0.8}


def inpainting(pipe, dense):
    again = AutoPipelineForInpainting.from_pipe(pipe)
    return again, {"image": GREY, "mask_image": WHITE, "strength": 0.8}


def controlnet(pipe, dense):
    # A ControlNet of the dense model; its conditioning is reduced as the small autoencoder's images are.
    control = ControlNetModel.from_unet(dense.unet, conditioning_embedding_out_channels=(16, 32, 96))
    torch.nn.init.normal_(control.controlnet_mid_block.weight, std=0.05)
    return StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=control), {"image": GREY}


STACKS = {
    "compile": Stack("`torch.compile`, one graph (AOT, eager kernels)", compiled, 1e-5, changes=False),
    "offload": Stack("group offloading of diffusers", offloaded, 1e-6, changes=False),
    "casting": Stack("layerwise casting: weights kept in bfloat16", cast, 0.1),
    "torchao": Stack("torchao, int8 weights", torchao_int8, 0.3),
    "quanto": Stack("optimum-quanto, int8 weights", quanto_int8, 0.3),
    "FirstBlockCache": Stack("FirstBlockCache of diffusers", first_block_cache, None, ("emoji-flux",)),
    "DeepCache": Stack("DeepCache", deep_cache, None, ("emoji-sdxl",)),
    "img2img": Stack("image to image, from the pruned components", image_to_image, None),
    "inpaint": Stack("inpainting, from the pruned components", inpainting, None),
    "ControlNet": Stack("a ControlNet of the dense model", controlnet, None, ("emoji-sdxl",)),
}


def latents(name: str, pipe, **more) -> torch.Tensor:
    """What a pipeline draws of one prompt."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(prompt="red apple", generator=generator, output_type="latent", **DRAW[name] | more)
    return drawn.images.float()


def table() -> str:
    """The README's table."""
    lines = ["| on top of a pruned model | tried on |", "|---|---|"]
    lines += [f"| {stack.words} | {', '.join(stack.models)} |" for stack in STACKS.values()]
    return "\n".join(lines) + "\n"
