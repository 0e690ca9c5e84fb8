"""Size and speed, measured."""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..architectures import find_groups
from ..machine import wait_for
from ..pipelines import denoiser_calls, denoiser_of, moved
from ..units import ALL_KINDS, PruneGroup


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def peak_of(pipe: DiffusionPipeline) -> Callable[[], int | None]:
    """From now on, what `pipe` needs on its device at most: its weights there, and what comes on top.

    Other pipelines that are there too do not count. Returns a function to ask for the bytes; it says None
    where torch does not count them (it does on CUDA).
    """
    device = denoiser_of(pipe).device
    if device.type != "cuda":
        return lambda: None
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = {p for module in modules for p in module.parameters() if p.device == device}
    own = sum(p.numel() * p.element_size() for p in weights)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return lambda: own + torch.cuda.max_memory_allocated(device) - before


@torch.no_grad()
def unit_macs(
    pipe: DiffusionPipeline, call: dict, groups: Iterable[PruneGroup] | None = None
) -> tuple[dict[str, int], int]:
    """Multiply-accumulates of one unit in one denoiser call, by group, and of the whole call.

    Counted from the shapes that flow through Linears, 2-D convolutions and attention in a real
    call; norms and activations are left out.

    Args:
        call: the pipeline's arguments; they fix the image size, the prompts and guidance.
    """
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser, ALL_KINDS) if groups is None else list(groups)
    rows: dict[str, int] = {}  # times that a module's weight is applied
    tokens: dict[str, tuple[int, int]] = {}  # batch and sequence length of what a Linear read

    def see(name: str):
        def hook(module, inputs, output):
            wide = output.shape[1 if isinstance(module, (nn.Conv2d, nn.Conv3d)) else -1]
            rows[name] = rows.get(name, 0) + output.numel() // max(1, wide)
            if inputs and inputs[0].ndim == 3:
                tokens[name] = tuple(inputs[0].shape[:2])

        return hook

    weights = {  # of which each is applied to a row of what its module reads
        name: [module.weight]
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))
    }
    for slot in (slot for group in groups for slot in group.consumers if slot.bare):  # one expert a row
        weights[slot.module] = [p[0] for p in denoiser.get_submodule(slot.module).parameters()]
    handles = [denoiser.get_submodule(name).register_forward_hook(see(name)) for name in weights]
    try:
        args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], denoiser.device)
        rows.clear()
        denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    total = sum(rows.get(name, 0) * sum(w.numel() for w in own) for name, own in weights.items())
    by_unit = {}
    for group in groups:
        by_unit[group.name] = sum(
            rows.get(slot.module, 0)
            * slot.index.shape[1]
            * ((slot.weight(denoiser)[0] if slot.bare else slot.weight(denoiser)).numel())
            // slot.features(denoiser)
            for slot in group.slots
            if slot.module in weights
        )
        if group.kind == "heads":
            attended = _attention_macs(group, tokens)
            by_unit[group.name] += attended
            total += attended * group.size
    return by_unit, total


def _attention_macs(group: PruneGroup, tokens: dict[str, tuple[int, int]]) -> int:
    """Of one head: queries times keys, and weights times values."""
    width = group.consumers[0].index.shape[1]
    batch, queries, keys = 1, 0, 0
    for slot in group.producers:
        read = tokens.get(slot.module)
        if read and slot.module.endswith(("to_q", "add_q_proj")):
            batch, queries = read[0], queries + read[1]
        elif read and slot.module.endswith(("to_k", "add_k_proj")):
            keys += read[1]
    return 2 * batch * queries * keys * width


@torch.no_grad()
def unit_milliseconds(
    pipe: DiffusionPipeline, call: dict, groups: Iterable[PruneGroup] | None = None, repeats: int = 3
) -> tuple[dict[str, float], float]:
    """Milliseconds of one unit in one denoiser call, by group, and of the whole call.

    The median time of every module that a group runs through, shared out by its features. What runs
    between them (attention itself, norms) is in the total only.

    Args:
        call: the pipeline's arguments; they fix the image size, the prompts and guidance.
    """
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser, ALL_KINDS) if groups is None else list(groups)
    names = {slot.module for group in groups for slot in group.slots}
    times: dict[str, list[float]] = {name: [] for name in names}
    started: dict[str, float] = {}

    device = denoiser.device  # finding it out costs more than a small layer

    def now() -> float:
        wait_for(device)
        return 1000 * time.perf_counter()

    def start(name, *_):
        started[name] = now()

    def stop(name, *_):
        times[name].append(now() - started[name])

    handles = []
    for name in names:
        module = denoiser.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(start, name)))
        handles.append(module.register_forward_hook(partial(stop, name)))
    args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], denoiser.device)
    try:
        denoiser(*args, **kwargs)
        for spent in times.values():
            spent.clear()  # that was the warm-up
        for _ in range(repeats):
            denoiser(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    by_unit = {}
    for group in groups:
        by_unit[group.name] = sum(
            statistics.median(times[slot.module] or [0.0]) * slot.index.shape[1] / slot.features(denoiser)
            for slot in group.slots
        )
    return by_unit, latency(pipe, call, repeats)


@torch.no_grad()
def latency(pipe: DiffusionPipeline, call: dict, repeats: int = 5) -> float:
    """Median milliseconds of one denoiser call, after a warm-up.

    Args:
        call: the pipeline's arguments; they fix the image size, the prompts and guidance.
    """
    denoiser = denoiser_of(pipe)
    args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], denoiser.device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        denoiser(*args, **kwargs)
        wait_for(denoiser.device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])
