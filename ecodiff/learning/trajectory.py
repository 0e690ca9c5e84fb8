"""A whole denoising run, z_T to z_0, that gradients flow through.

The pipeline's own `__call__` is the model: nothing of it is copied. Each call of the denoiser is
one time step, so checkpointing those calls is EcoDiff's time step gradient checkpointing: the
backward pass recomputes one step at a time and what is kept does not grow with their number,
beyond the latents themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..pipelines import (
    attention_with_fast_backward,
    denoiser_of,
    frozen,
    latent_call,
    other_denoisers,
    quiet,
    replaced_forward,
)
from ..pruning.masking import factors_of
from .checkpointing import ALL, NOTHING, Keep, block_by_block, recomputed
from .streaming import streamed


@contextmanager
def trajectory(
    pipe: DiffusionPipeline,
    checkpoint: bool | Keep = True,
    on_step: Callable[[], None] | None = None,
    trained: Sequence[torch.nn.Parameter] = (),
) -> Iterator[Callable[..., Tensor]]:
    """Open a pipeline for differentiable runs.

    Yields a function that takes the pipeline's own arguments and returns the final latents z_0.
    Run the backward pass while this context (and the one that applies masks) is open: the
    recomputation needs them.

    Args:
        pipe: a pipeline with `output_type="latent"`. Its weights get no gradient in here, but `trained`.
        checkpoint: keep only the latents and recompute each step in the backward pass. Without,
            memory grows with the number of steps. A `Keep` is between the two, or beyond.
        on_step: called before every call of the denoiser that is pruned, recomputations included; what it
            raises ends the run. This is where a stop flag or a deadline is looked at.
        trained: weights of the denoiser that gradients flow to.

    Example:
        >>> with masked(pipe.unet, gates), trajectory(pipe) as run:
        ...     z0 = run("a red apple", num_inference_steps=8, generator=generator)
        ...     z0.square().mean().backward()
    """
    denoiser, call = denoiser_of(pipe), latent_call(pipe)
    forward = denoiser.forward

    def step(*args, **kwargs):
        if on_step is not None:
            on_step()
        return forward(*args, **kwargs)

    keep = checkpoint if isinstance(checkpoint, Keep) else NOTHING if checkpoint else ALL
    calls = 0

    def kept_or_recomputed(*args, **kwargs):
        nonlocal calls
        calls += 1
        kept = calls > keep.recomputed or not torch.is_grad_enabled()
        if kept:
            return step(*args, **kwargs)
        return recomputed(step, [*factors_of(denoiser), *trained], args, kwargs)

    def run(*args, **kwargs) -> Tensor:
        nonlocal calls
        calls = 0
        return call(pipe, *args, output_type="latent", return_dict=False, **kwargs)[0]

    with (
        quiet(pipe),
        no_graph_left(pipe),
        frozen(pipe, trained),
        block_by_block(denoiser, keep.blocks or streamed(denoiser)),
        replaced_forward(denoiser, kept_or_recomputed),
        attention_with_fast_backward(denoiser),
        other_denoisers_recomputed(pipe, keep),
        torch.enable_grad(),
    ):
        yield run


@contextmanager
def other_denoisers_recomputed(pipe: DiffusionPipeline, keep: Keep) -> Iterator[None]:
    """Recompute calls of denoisers that are not pruned too, where gradients flow through them."""

    def call(own: Callable, *args, **kwargs):
        if keep == ALL or not torch.is_grad_enabled():
            return own(*args, **kwargs)
        return recomputed(own, [], args, kwargs)

    with ExitStack() as stack:
        for model in other_denoisers(pipe):
            stack.enter_context(block_by_block(model, keep.blocks or streamed(model)))
            stack.enter_context(replaced_forward(model, partial(call, model.forward)))
        yield


@contextmanager
def no_graph_left(pipe: DiffusionPipeline) -> Iterator[None]:
    """Schedulers that keep the predictions of past steps (PNDM) keep the graph with them: cut it off."""
    try:
        yield
    finally:
        scheduler = getattr(pipe, "scheduler", None)
        for name, value in list(vars(scheduler).items()) if scheduler is not None else ():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(scheduler, name, value.detach())
            elif isinstance(value, list):
                setattr(scheduler, name, [v.detach() if isinstance(v, Tensor) else v for v in value])
