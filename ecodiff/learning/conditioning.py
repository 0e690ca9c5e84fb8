"""What the denoiser is given of a prompt, with gradients to the text encoders, and their recorded calls."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..config import Sampling
from ..pipelines import (
    EnoughError,
    call_options,
    denoiser_of,
    frozen,
    latent_call,
    moved,
    prompt_rows,
    quiet,
)
from .calibration import Call
from .encodings import text_encoders

PROMPTS = 128  # at most; the first is an empty one, which guidance draws with
HELDOUT = 5  # every fifth call of a text encoder only checks what repair learned on the others


def prompt_call(pipe: DiffusionPipeline, prompt: str, config: Sampling) -> dict:
    """The pipeline's arguments for one prompt."""
    options = call_options(pipe, config.inference_steps, config.guidance_scale, config.size, config.extra)
    return prompt_rows([prompt], [0], config.seed, options)


def conditioning(pipe: DiffusionPipeline, call: dict) -> list[Tensor]:
    """What the denoiser is given that gradients flow to text encoders from, before its first call.

    Padding that an attention mask takes out is zero in it.
    """
    found: list[Tensor] = []

    def enough(module, args, kwargs):
        masks = [value for name, value in kwargs.items() if "mask" in name and isinstance(value, Tensor)]
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                own = next((mask for mask in masks if mask.shape == leaf.shape[:2]), None)
                found.append(leaf if own is None else leaf * (own > 0).to(leaf.dtype)[..., None])
        raise EnoughError

    hook = denoiser_of(pipe).register_forward_pre_hook(enough, with_kwargs=True)
    run = latent_call(pipe)
    try:
        with quiet(pipe), frozen(pipe), torch.enable_grad():
            run(pipe, **call, output_type="latent", return_dict=False)
    except EnoughError:
        pass
    finally:
        hook.remove()
    return found


class Recording:
    """While it is open, an encoder's calls are kept, on the CPU."""

    def __init__(self, encoder: nn.Module, calls: list[Call]):
        self.encoder, self.calls = encoder, calls

    def __enter__(self) -> None:
        self.hook = self.encoder.register_forward_pre_hook(self._keep, with_kwargs=True)

    def __exit__(self, *error) -> None:
        self.hook.remove()

    def _keep(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        args, kwargs = moved((args, kwargs), "cpu")
        self.calls.append(Call(args, kwargs, len(self.calls) % HELDOUT == HELDOUT - 1))


@torch.no_grad()
def encoder_calls(pipe: DiffusionPipeline, prompts: Sequence[str], config: Sampling) -> dict[str, list[Call]]:
    """Calls of each text encoder on prompts, to repair it by; no denoiser call is made."""
    calls: dict[str, list[Call]] = {name: [] for name in text_encoders(pipe)}
    with ExitStack() as watching:
        for name, encoder in text_encoders(pipe).items():
            watching.enter_context(Recording(encoder, calls[name]))
        for prompt in ["", *prompts][:PROMPTS]:
            conditioning(pipe, prompt_call(pipe, prompt, config))
    return calls
