"""Time step gradient checkpointing: what a backward pass keeps of a trajectory, and what it recomputes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, log2

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(frozen=True)
class Keep:
    """What is kept for the backward pass: the activations of all denoiser calls but the first `recomputed`.

    Those are recomputed from their latents; with `blocks`, block by block. The last calls are the ones to
    keep: they are used up before the first recomputation needs the room. With `alone`, text encoders are
    not kept beside it (see `encodings`).
    """

    recomputed: float = inf
    blocks: bool = False
    alone: bool = False


ALL, NOTHING = Keep(0), Keep()


@contextmanager
def block_by_block(denoiser: ModelMixin, wanted: bool) -> Iterator[None]:
    """diffusers' own gradient checkpointing, where the model has it and does not use it already."""
    wanted = wanted and getattr(denoiser, "_supports_gradient_checkpointing", False)
    if not wanted or denoiser.is_gradient_checkpointing:
        yield
        return
    denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()


class _Recomputed(torch.autograd.Function):
    """A call of which only the arguments are kept; it is made again in the backward pass.

    torch's checkpoint does the same, but either keeps the graph's nodes (megabytes a time step of a
    large network) or does not see the gates, which are no arguments of the denoiser: here they are.
    Nothing in a call is random (dropout is off, gates are drawn outside), so no RNG is restored.
    """

    @staticmethod
    def forward(ctx, call, factors: list[Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call, ctx.factors = call, factors
        ctx.save_for_backward(*tensors[: len(tensors) - len(factors)])
        return call(tensors)

    @staticmethod
    def backward(ctx, *gradients):
        needed = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(n) for t, n in zip(ctx.saved_tensors, needed, strict=False)]
        with torch.enable_grad():
            outputs = ctx.call(inputs)
        wanted = [t for t, n in zip((*inputs, *ctx.factors), needed, strict=True) if n]
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
        if not pairs:  # nothing that was asked about has to do with the outputs
            return (None, None, *(None for _ in needed))
        outputs, gradients = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, None, *(next(found) if n else None for n in needed))


def recomputed(step: Callable, factors: list[Tensor], args: tuple, kwargs: dict):
    """What `step` gives; gradients flow to tensors among the arguments and to `factors`."""
    leaves, spec = tree_flatten((args, kwargs))
    at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    given: list = []

    def call(tensors) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for index, tensor in zip(at, tensors, strict=False):
            filled[index] = tensor
        again, more = tree_unflatten(filled, spec)
        outputs, out_spec = tree_flatten(step(*again, **more))
        given[:] = [out_spec]
        return tuple(outputs)

    outputs = _Recomputed.apply(call, factors, *(leaves[index] for index in at), *factors)
    return tree_unflatten(list(outputs), given[0])


def gradients(loss: Tensor, z0: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of a loss that is a mean over the elements of z_0.

    They are computed of the sum: an element's share of a mean, 1 / elements of it, is less than float16
    can hold once latents are as large as those of SDXL. A power of two, so no other bit changes. Where the
    sum's are too large for float16 on their way, they are computed again of less.
    """
    scale = 2.0 ** round(log2(z0.numel()))
    while True:
        less = z0.dtype == torch.float16 and scale > 1
        found = torch.autograd.grad(scale * loss, inputs, allow_unused=True, retain_graph=less)
        if not less or all(gradient is None or gradient.isfinite().all() for gradient in found):
            break
        scale = max(1.0, scale / 64)
    return [None if gradient is None else gradient / scale for gradient in found]
