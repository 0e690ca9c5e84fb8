"""Size and speed, measured."""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..architectures import find_groups
from ..architectures.inputs import evenly_routed
from ..machine import wait_for
from ..pipelines import denoiser_calls, denoiser_of, frozen, moved
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

    Counted by torch's FlopCounterMode, module by module, in a real call: half its FLOPs. Of a layer's, a
    unit has its features' share; of what an attention does itself, a head has a head's share. Norms and
    activations are not counted.

    Args:
        call: the pipeline's arguments; they fix the image size, the prompts and guidance.
    """
    denoiser = denoiser_of(pipe)
    args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], denoiser.device)
    with frozen(pipe):  # the counter hooks into what has gradients
        return macs_by_unit(denoiser, args, kwargs, groups)


@torch.no_grad()
def macs_by_unit(
    denoiser: nn.Module, args: tuple, kwargs: dict, groups: Iterable[PruneGroup] | None = None
) -> tuple[dict[str, int], int]:
    """As `unit_macs`, of a call whose arguments are given; on the meta device nothing is computed."""
    groups = find_groups(denoiser, ALL_KINDS) if groups is None else list(groups)
    macs = module_macs(denoiser, args, kwargs)
    by_unit = {}
    for group in groups:
        # Of experts packed in two tensors of one module, the module's are counted once; scales have none.
        slots = [slot for slot in group.slots if not slot.bare or slot in group.consumers]
        by_unit[group.name] = sum(
            macs.get(slot.module, 0) * slot.index.shape[1] // slot.features(denoiser) for slot in slots
        )
        if group.setup:  # each consumer projects what it reads, onto one direction less
            weights = {slot.module: slot.weight(denoiser).numel() for slot in slots}
            by_unit[group.name] += sum(macs.get(n, 0) * group.size // size for n, size in weights.items())
        if group.kind == "heads":
            by_unit[group.name] += _attention_macs(group, macs) // group.size
    return by_unit, macs[""]


def module_macs(denoiser: nn.Module, args: tuple, kwargs: dict) -> dict[str, int]:
    """Multiply-accumulates of every module in one call, what is inside it included; "" is the whole."""
    # As matrix products: of a fused attention on a CPU the counter knows nothing.
    products = sdpa_kernel(SDPBackend.MATH)
    with products, evenly_routed(denoiser), FlopCounterMode(display=False) as counter:
        denoiser(*args, **kwargs)
    root = type(denoiser).__name__
    counts = {name: sum(found.values()) // 2 for name, found in counter.get_flop_counts().items()}
    inside = {n.removeprefix(f"{root}."): count for n, count in counts.items() if n.startswith(f"{root}.")}
    return inside | {"": counts["Global"]}


def _attention_macs(group: PruneGroup, macs: dict[str, int]) -> int:
    """Of all heads of an attention: what it does besides its layers."""
    inside = [name for name in macs if name.startswith(f"{group.name}.")]
    outermost = [n for n in inside if not any(n.startswith(f"{other}.") for other in inside)]
    return max(0, macs.get(group.name, 0) - sum(macs[name] for name in outermost))


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


PAIRS, NARROW, WIDE = 8, 0.03, 0.15  # of `speedup`: pairs at least; half-widths that suffice, or are refused


@torch.no_grad()
def speedup(
    pipe: DiffusionPipeline, small: DiffusionPipeline, call: dict, seconds: float = 3.0
) -> tuple[float, float, float] | None:
    """How much faster a denoiser call of `small` is: (low, ratio, high), a 95 % interval.

    Dense and pruned are called in turn, so whatever else the machine does slows both, until the interval is
    within 3 % or the time is over. None: it is wider than 15 % even so; the machine is busy.

    Args:
        call: the pipeline's arguments; they fix the image size, the prompts and guidance.
    """
    denoisers = denoiser_of(pipe), denoiser_of(small)
    device = denoisers[0].device
    args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], device)
    logs: list[float] = []
    begun, width = time.perf_counter(), math.inf
    while len(logs) < PAIRS + 1 or (width > NARROW and time.perf_counter() - begun < seconds):
        spent = []
        for denoiser in denoisers:
            start = time.perf_counter()
            denoiser(*args, **kwargs)
            wait_for(device)
            spent.append(time.perf_counter() - start)
        logs.append(math.log(spent[0] / spent[1]))
        if len(logs) > PAIRS:  # the first is the warm-up
            width = 1.96 * statistics.stdev(logs[1:]) / math.sqrt(len(logs) - 1)
    middle = statistics.fmean(logs[1:])
    if width > WIDE:
        return None
    return math.exp(middle - width), math.exp(middle), math.exp(middle + width)


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
