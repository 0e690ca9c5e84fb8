"""How a diffusers pipeline is called: its denoiser, its options, rows of prompts, recorded denoiser calls."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from .errors import UnsupportedModelError
from .machine import device_of

DENOISERS = ("unet", "transformer")
# Beside it in some pipelines: of the time steps with little noise (Wan 2.2 A14B), of calls without a prompt.
SECOND_DENOISERS = ("transformer_2", "unconditional_transformer")


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The name of the component that is pruned: "unet" or "transformer", if no other was chosen.

    Raises:
        UnsupportedModelError: the pipeline has neither.
    """
    for name in (getattr(pipe, "chosen_denoiser", ""), *DENOISERS):
        if name and isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise UnsupportedModelError(
        f"{type(pipe).__name__} has no `unet` and no `transformer`; ecodiff prunes those."
    )


def choose_denoiser(pipe: DiffusionPipeline, name: str) -> None:
    """Let `name` be what is pruned of a pipeline that has two denoisers. The other one stays as it is.

    Raises:
        UnsupportedModelError: it has no such denoiser.
    """
    if name not in (*DENOISERS, *SECOND_DENOISERS) or not isinstance(getattr(pipe, name, None), nn.Module):
        raise UnsupportedModelError(f"This {type(pipe).__name__} has no denoiser that is called {name!r}.")
    pipe.chosen_denoiser = name


def denoiser_of(pipe: DiffusionPipeline) -> ModelMixin:
    """The component that is pruned; if it is compiled, the model under the wrapper."""
    denoiser = getattr(pipe, denoiser_name(pipe))
    return getattr(denoiser, "_orig_mod", denoiser)


def other_denoisers(pipe: DiffusionPipeline) -> list[ModelMixin]:
    """Denoisers that work in the same trajectories and are not pruned."""
    names = [name for name in (*DENOISERS, *SECOND_DENOISERS) if name != denoiser_name(pipe)]
    found = [getattr(pipe, name, None) for name in names]
    return [getattr(part, "_orig_mod", part) for part in found if isinstance(part, nn.Module)]


def call_options(
    pipe: DiffusionPipeline,
    steps: int | None,
    guidance_scale: float | None,
    size: int | None,
    extra: dict | None = None,
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


def stream(purpose: str, seed: int, number: int = 0) -> torch.Generator:
    """A generator for one purpose: the same seed and number give unrelated draws for another.

    Args:
        purpose: "latents", "probe", "gates", "order", "heal": what is drawn.
        number: of the row or step that it is drawn for.
    """
    digest = hashlib.sha256(f"{purpose}|{seed}|{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))


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
        "generator": [stream("latents", seed, row) for row in rows],
    }


def latent_call(pipe: DiffusionPipeline) -> Callable:
    """The pipeline's `__call__`, without diffusers' `torch.no_grad` around it."""
    call = inspect.unwrap(type(pipe).__call__)
    if "output_type" not in inspect.signature(call).parameters:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} cannot return latents (it has no output_type argument)."
        )
    return call


def cut_off(pipe: DiffusionPipeline, prompt: str) -> str:
    """The end of a prompt that no text encoder of the pipeline reads; "" if all of it is read."""
    rests = []
    for name, tokenizer in pipe.components.items():
        most = getattr(tokenizer, "model_max_length", None)
        if not name.startswith("tokenizer") or not most or most > 10_000:
            continue
        ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
        kept = tokenizer(prompt, truncation=True, max_length=most).input_ids
        if len(ids) <= len(kept):
            return ""
        rests.append(tokenizer.decode(ids[most - 1 : -1], skip_special_tokens=True).strip())
    return min(rests, key=len, default="")


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """No progress bars."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def frozen(pipe: DiffusionPipeline, trained: Sequence[torch.nn.Parameter] = ()) -> Iterator[None]:
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
def replaced_forward(denoiser: torch.nn.Module, replacement: Callable) -> Iterator[None]:
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


class EnoughError(Exception):
    """Ends a run, or a forward pass, once enough of it has been seen."""


def denoiser_calls(
    pipe: DiffusionPipeline, call: dict, limit: int | None = None, on_step=None
) -> list[tuple[tuple, dict]]:
    """Arguments of every call of the denoiser in one run, on the CPU: [(args, kwargs)].

    Args:
        call: the pipeline's arguments.
        limit: stop the run after so many calls.
        on_step: called before every denoiser call; raise in it to stop.

    Raises:
        UnsupportedModelError: the pipeline cannot return latents.
    """
    denoiser = denoiser_of(pipe)
    made: list[tuple[tuple, dict]] = []

    def keep(module, args, kwargs):
        if limit is not None and len(made) == limit:
            raise EnoughError
        made.append(moved((args, kwargs), "cpu"))
        if on_step is not None:
            on_step()

    run = latent_call(pipe)
    hook = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with quiet(pipe), frozen(pipe), attention_with_fast_backward(denoiser), torch.no_grad():
            run(pipe, **call, output_type="latent", return_dict=False)
    except EnoughError:
        pass
    finally:
        hook.remove()
    return made


def moved(tree, device):
    """The same nest of arguments with its tensors on `device`, without gradients."""
    return tree_map(lambda leaf: leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf, tree)


def attention_with_fast_backward(denoiser):
    """On a CPU the fused attention's backward pass takes longer than the rest of the network.

    Elsewhere torch chooses; the choice is the whole process's, and other devices may be at work.
    """
    cpu = device_of(denoiser).type == "cpu"
    return sdpa_kernel(SDPBackend.MATH) if cpu else nullcontext()
