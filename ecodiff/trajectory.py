"""A whole denoising run, z_T to z_0, that gradients flow through.

The pipeline's own `__call__` is the model: nothing of it is copied. Each call of the denoiser is
one time step, so checkpointing those calls is EcoDiff's time step gradient checkpointing: the
backward pass recomputes one step at a time and what is kept does not grow with their number,
beyond the latents themselves.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf, log2

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import UnsupportedModelError
from .gates import factors_of
from .groups import denoiser_of


def call_options(
    pipe, steps: int | None, guidance_scale: float | None, size: int | None, extra: dict | None = None
) -> dict:
    """Keyword arguments for a pipeline's `__call__`: what is given and what it knows, and `extra`."""
    wanted = {
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "height": size,
        "width": size,
    }
    known = inspect.signature(type(pipe).__call__).parameters
    given = {name: value for name, value in wanted.items() if value is not None and name in known}
    return given | (extra or {})


def prompt_rows(prompts: Sequence[str], rows: Iterable[int], seed: int, options: dict) -> dict:
    """Arguments of a pipeline's `__call__` for some (prompt, seed) pairs: row i of prompt i mod n.

    Args:
        options: what else the call takes; a negative prompt goes with every row.
    """
    rows = list(rows)
    if isinstance(options.get("negative_prompt"), str):
        options = options | {"negative_prompt": [options["negative_prompt"]] * len(rows)}
    return options | {
        "prompt": [prompts[row % len(prompts)] for row in rows],
        "generator": [torch.Generator().manual_seed(seed * 1_000_003 + row) for row in rows],
    }


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
def trajectory(
    pipe,
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
        on_step: called before every denoiser call, recomputations included; what it raises ends
            the run. This is where a stop flag or a deadline is looked at.
        trained: weights of the denoiser that gradients flow to.

    Example:
        >>> with masked(pipe.unet, gates), trajectory(pipe) as run:
        ...     z0 = run("a red apple", num_inference_steps=8, generator=generator)
        ...     z0.square().mean().backward()
    """
    denoiser, call = denoiser_of(pipe), _call_of(pipe)
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
        _quiet(pipe),
        _frozen(pipe, trained),
        _block_by_block(denoiser, keep.blocks),
        _forward(denoiser, kept_or_recomputed),
        _attention_with_fast_backward(denoiser),
        torch.enable_grad(),
    ):
        yield run


def _call_of(pipe) -> Callable:
    """The pipeline's `__call__`, without diffusers' `torch.no_grad` around it."""
    call = inspect.unwrap(type(pipe).__call__)
    if "output_type" not in inspect.signature(call).parameters:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} cannot return latents (it has no output_type argument)."
        )
    return call


@contextmanager
def _quiet(pipe) -> Iterator[None]:
    """No progress bars."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def _frozen(pipe, trained: Sequence[torch.nn.Parameter] = ()) -> Iterator[None]:
    """No weight but `trained` gets a gradient, nothing is random; afterwards everything is as it was."""
    # Text encoders too: a graph through them would be kept for nothing.
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    kept = {id(parameter) for parameter in trained}
    others = [p for part in parts for p in part.parameters() if p.requires_grad and id(p) not in kept]
    modes = {module: module.training for module in denoiser_of(pipe).modules()}
    # HiDream: experts have gradients in training mode only, and only if that is not overruled.
    overruled = [module for module in modes if getattr(module, "_force_inference_output", False)]
    for parameter in others:
        parameter.requires_grad_(False)
    for module in modes:
        module.training = hasattr(module, "moe_infer")
    for module in overruled:
        module._force_inference_output = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for module in overruled:
            module._force_inference_output = True
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def _block_by_block(denoiser: torch.nn.Module, wanted: bool) -> Iterator[None]:
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


@contextmanager
def _forward(denoiser: torch.nn.Module, replacement: Callable) -> Iterator[None]:
    """Let calls of the denoiser go to `replacement`."""
    own = denoiser.__dict__.get("forward")
    denoiser.forward = replacement
    try:
        yield
    finally:
        if own is None:
            del denoiser.forward
        else:
            denoiser.forward = own


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
    given = []

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


class EnoughError(Exception):
    """Ends a run, or a forward pass, once enough of it has been seen."""


def denoiser_calls(pipe, call: dict, limit: int | None = None, on_step=None) -> list[tuple[tuple, dict]]:
    """Arguments of every call of the denoiser in one run, on the CPU: [(args, kwargs)].

    Args:
        call: the pipeline's arguments.
        limit: stop the run after so many calls.

    Raises:
        UnsupportedModelError: the pipeline cannot return latents.
    """
    made: list[tuple[tuple, dict]] = []

    def keep(module, args, kwargs):
        if limit is not None and len(made) == limit:
            raise EnoughError
        made.append(moved((args, kwargs), "cpu"))

    hook = denoiser_of(pipe).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with trajectory(pipe, checkpoint=False, on_step=on_step) as run, torch.no_grad():
            run(**call)
    except EnoughError:
        pass
    finally:
        hook.remove()
    return made


def moved(tree, device):
    """The same nest of arguments with its tensors on `device`, without gradients."""
    return tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, tree)


def _attention_with_fast_backward(denoiser):
    """On a CPU the fused attention's backward pass takes longer than the rest of the network.

    Elsewhere torch chooses; the choice is the whole process's, and other devices may be at work.
    """
    cpu = next(denoiser.parameters()).device.type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext()
