"""A pipeline that nobody has seen: any denoiser, in a loop of plain Euler steps."""

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils._pytree import tree_map

from tests.denoisers import Row


class LoopPipeline(DiffusionPipeline):
    """Draws latents with a denoiser of a `Row` and what that row calls it with; prompts say nothing.

    The first of the row's arguments is the latents. Where the denoiser predicts more than them (a
    variance, say), the rest is left out; where it reads conditions beside them, those stay.
    """

    def __init__(self, transformer: torch.nn.Module):
        super().__init__()
        self.register_modules(transformer=transformer)
        self.given: dict = {}

    @classmethod
    def of(cls, row: Row, denoiser: torch.nn.Module) -> "LoopPipeline":
        pipe = cls(denoiser.float())
        pipe.given = tree_map(_single, row.given())
        return pipe

    @property
    def batch(self) -> int:
        """Rows of a call."""
        return len(next(iter(self.given.values())))

    def __call__(
        self, prompt, generator, num_inference_steps=2, output_type="latent", return_dict=False
    ) -> tuple[torch.Tensor]:
        name, like = next(iter(self.given.items()))
        latents = torch.stack([torch.randn(like.shape[1:], generator=g) for g in generator])
        for _ in range(num_inference_steps):
            out = self.transformer(**self.given | {name: latents}, return_dict=False)[0]
            out = torch.stack(out) if isinstance(out, list) else out
            out = out.flatten(1)[:, : like[0].numel()]
            out = nn.functional.pad(out, (0, like[0].numel() - out.shape[1]))
            latents = latents - out.view_as(like) / num_inference_steps
        return (latents,)


def _single(leaf):
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
