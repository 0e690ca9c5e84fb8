"""What a pipeline may not carry while it is learned on, cut or saved: told before anything is done.

Adapters, quantised weights, compiled wrappers, caches and offloading change a denoiser's layers or its calls.
Pruned under them, heads would be missed, images would be the dense model's, or a folder would not open.
They go on top of the pruned model.
"""

import inspect

from diffusers import DiffusionPipeline
from torch import nn

from .errors import BudgetError, UnsupportedModelError
from .pipelines import denoiser_name, denoiser_of

# Packages whose tensors hold quantised weights.
QUANTISERS = ("torchao", "bitsandbytes", "optimum", "diffusers.quantizers", "nunchaku")
WANTS_AN_IMAGE = ("strength", "mask_image", "control_image", "image_embeds")
WORDS_FOR_IMAGES = ("Img2Img", "Inpaint", "ImageToVideo", "ImageToImage", "Edit", "Upscale")


def check_layers(denoiser: nn.Module) -> None:
    """Raise UnsupportedModelError if layers are wrapped by an adapter or quantised.

    Args:
        denoiser: of any class, on any device.
    """
    name = type(denoiser).__name__
    for path, module in denoiser.named_modules():
        if hasattr(module, "base_layer"):
            raise UnsupportedModelError(
                f"This {name} carries a LoRA or another adapter (on {path}). Unload it first, with "
                "pipe.unload_lora_weights(), or fuse it and then unload it: pipe.fuse_lora(), "
                "pipe.unload_lora_weights(). LoRAs can be cut to fit what is pruned (ecodiff.translate_lora)."
            )
        kinds = {type(p).__module__ for p in module._parameters.values() if p is not None}
        if hasattr(module, "weight_qtype") or any(kind.startswith(QUANTISERS) for kind in kinds):
            raise UnsupportedModelError(
                f"This {name} is quantised (its {path}). Prune the full-precision model, then quantise what "
                "is left."
            )


def check_calls(denoiser: nn.Module) -> None:
    """Raise UnsupportedModelError if calls of the denoiser are cached, cast, offloaded or replaced."""
    for path, module in denoiser.named_modules():
        where = path or "the whole model"
        if type(getattr(module, "processor", None)).__name__.startswith("IPAdapter"):
            raise UnsupportedModelError(
                f"This {type(denoiser).__name__} carries an IP-Adapter (on {path}). "
                "Unload it first: pipe.unload_ip_adapter()."
            )
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
        if hooks:
            raise UnsupportedModelError(
                f"This {type(denoiser).__name__} has hooks of diffusers on {where} ({', '.join(hooks)}): a "
                "cache, layerwise casting or offloading. Open the pipeline without them, and put them on "
                "what is pruned."
            )
        if hasattr(module, "_hf_hook") or "forward" in vars(module):
            raise UnsupportedModelError(
                f"The forward of {where} is replaced: by offloading, or by a cache such as DeepCache. Take "
                "it away first, and put it on what is pruned."
            )


def check_pipeline(pipe: DiffusionPipeline) -> None:
    """All of the above for a pipeline's denoiser, which must not be compiled either: learning changes it."""
    if hasattr(getattr(pipe, denoiser_name(pipe)), "_orig_mod"):
        raise UnsupportedModelError(
            "This denoiser is wrapped by torch.compile. Give the model under it (pipe.unet._orig_mod or "
            "pipe.transformer._orig_mod), and compile what is pruned."
        )
    check_layers(denoiser_of(pipe))
    check_calls(denoiser_of(pipe))


def needs_an_image(pipeline: type) -> bool:
    """True for pipelines that draw from an image besides a prompt, so prompts alone are not enough."""
    known = inspect.signature(pipeline.__call__).parameters
    worded = any(word in pipeline.__name__ for word in WORDS_FOR_IMAGES)
    return "prompt" not in known or (("image" in known or worded) and any(n in known for n in WANTS_AN_IMAGE))


def check_class(pipeline: type) -> None:
    """Raise UnsupportedModelError if a class of pipelines cannot be learned on with prompts alone."""
    if needs_an_image(pipeline):
        raise UnsupportedModelError(
            f"{pipeline.__name__} needs an image besides a prompt, and ecodiff learns from prompts alone. "
            "Prune the text-to-image model that it belongs to, and make this pipeline of the pruned parts."
        )


def check_options(extra: dict) -> None:
    """Raise BudgetError for arguments of a call that learning cannot have."""
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if extra.get(name, 1) != 1:
            raise BudgetError(
                f"{name} is {extra[name]}; learning draws one a prompt. Give more prompts instead."
            )


def without_values(module: nn.Module, name: str) -> str:
    """The first parameter without values, as `name.path`; "" if all have some."""
    for path, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            return f"{name}.{path}"
    return ""
