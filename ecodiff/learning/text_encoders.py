"""Text encoders, pruned by what the denoiser is given of a prompt: its embeddings, pooled ones too.

The objective is that of the denoiser with the embeddings e in place of z_0: ||e(m) - e(1)||^2 over var e, a
mean over elements, summed over the tensors that the denoiser is given. Its Gauss-Newton metric takes a
backward pass through the text encoders for each prompt, and no denoiser call; order and repair are those of
`surgeon` and `compensate`. Layers that nothing is read of (`checkpoints.unused`) get no gradient and stay.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups
from ..config import Sampling
from ..errors import UnsupportedModelError
from ..pipelines import stream
from ..pruning.masking import masked
from ..pruning.scores import Scores
from ..units import PruneGroup
from .calibration import Call, Statistics, seen
from .conditioning import PROMPTS, Recording, conditioning, prompt_call
from .encodings import text_encoders
from .surgeon import Removal, Watched, merged, ordered, readers

KINDS = ("heads", "ffn")


def rank_text_encoders(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: Sampling | None = None,
    on_prompt: Callable[[], None] | None = None,
) -> Scores:
    """All heads and FFN neurons of a pipeline's text encoders in one order, by worth per parameter.

    Args:
        prompts: up to 128 of them are used.
        config: guidance and what else the pipeline is called with.
        on_prompt: called before each; raise in it to stop.

    Returns:
        Scores over groups named "text_encoder.<group>", for `Scores.plan`; `total` counts the parameters of
        all text encoders.

    Raises:
        UnsupportedModelError: the pipeline has no text encoders with heads or FFN neurons that are read.
    """
    config, encoders = config or Sampling(), text_encoders(pipe)
    groups = _groups(encoders)
    plain, metric, layers = {}, {}, {}
    calls: dict[str, list[Call]] = {}
    for name, encoder in encoders.items():
        layers[name] = readers(encoder, groups[name])
        metric[name] = {path: torch.zeros(2 * (len(m.weight),)) for path, m in layers[name].items()}
        plain[name] = {group.name: torch.zeros(group.size) for group in groups[name]}
        calls[name] = []
    asked = ["", *prompts][:PROMPTS]
    for number, prompt in enumerate(asked):
        if on_prompt is not None:
            on_prompt()
        call = prompt_call(pipe, prompt, config)
        with ExitStack() as watching:
            for name, encoder in encoders.items():
                watching.enter_context(Recording(encoder, calls[name]))
                watching.enter_context(Watched(layers[name], metric[name]))
            found = _sample(pipe, encoders, groups, call, stream("probe", config.seed, number))
        for name, squares in found.items():
            for group, square in squares.items():
                plain[name][group] += square / len(asked)
    values: dict[str, Tensor] = {}
    orders: list[list[Removal]] = []
    for name, encoder in encoders.items():
        read = [group for group in groups[name] if plain[name][group.name].any()]
        scaled = {path: total / len(asked) for path, total in metric[name].items()}
        gather = partial(_gathered, encoder, calls[name])
        for order, _ in ordered(encoder, read, readers(encoder, read), scaled, plain[name], gather):
            orders.append([replace(removal, group=f"{name}.{removal.group}") for removal in order])
        values |= {f"{name}.{group.name}": torch.empty(group.size) for group in read}
    if not values:
        raise UnsupportedModelError(
            f"The text encoders of this {type(pipe).__name__} have no heads or FFN neurons that are known."
        )
    ranked = merged(orders, {name: len(value) for name, value in values.items()})
    return _scores(encoders, ranked)


def _groups(encoders: Mapping[str, nn.Module]) -> dict[str, list[PruneGroup]]:
    found = {}
    for name, encoder in encoders.items():
        try:
            found[name] = find_groups(encoder, KINDS)
        except UnsupportedModelError:
            found[name] = []
    return found


def _scores(encoders: Mapping[str, nn.Module], ranked: Mapping[str, Tensor]) -> Scores:
    """One ranking over all encoders."""
    parts = {}
    for name, encoder in encoders.items():
        start = f"{name}."
        own = {n.removeprefix(start): value for n, value in ranked.items() if n.startswith(start)}
        parts[name] = Scores.of(encoder, own)

    def named(field: str) -> dict[str, Any]:
        return {f"{n}.{g}": fact for n, part in parts.items() for g, fact in getattr(part, field).items()}

    return Scores(
        values=named("values"),
        kinds=named("kinds"),
        costs=named("costs"),
        floors=named("floors"),
        total=sum(part.total for part in parts.values()),
        metadata={"method": "surgeon", "component": "text encoders"},
        itemsize=next(iter(parts.values())).itemsize,
    )


def _sample(
    pipe: DiffusionPipeline,
    encoders: Mapping[str, nn.Module],
    groups: Mapping[str, list[PruneGroup]],
    call: dict,
    generator: torch.Generator,
) -> dict[str, dict[str, Tensor]]:
    """One random projection: squared gradients of r . e with respect to every gate, by encoder and group."""
    gates = {
        name: {g.name: torch.ones(g.size, device=_device(encoders[name]), requires_grad=True) for g in own}
        for name, own in groups.items()
    }
    with ExitStack() as masks:
        for name, encoder in encoders.items():
            masks.enter_context(masked(encoder, gates[name]))
        total: Any = 0.0
        for e in conditioning(pipe, call):
            if e.numel() < 2:  # of an empty prompt there may be no token
                continue
            e = e.float()
            r = torch.randn(e.shape, generator=generator).to(e.device)
            total = total + (r * e).sum() / (e.detach().var() * e.numel()).sqrt().clamp_min(1e-12)
        places = [(name, group) for name, own in gates.items() for group in own]
        leaves = [gates[name][group] for name, group in places]
        gradients: Iterable[Tensor | None] = [None] * len(leaves)
        if isinstance(total, Tensor):
            gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in encoders}
    for (name, group), leaf, gradient in zip(places, leaves, gradients, strict=True):
        square = torch.zeros_like(leaf) if gradient is None else gradient.float().square()
        found[name][group] = square.detach().cpu()
    return found


@torch.no_grad()
def _gathered(encoder: nn.Module, calls: Sequence[Call], names: Sequence[str]) -> dict[str, Statistics]:
    inputs = {name: Statistics() for name in names}
    for call in calls if names else ():
        for name, (x, y) in seen(encoder, call, list(names)).items():
            inputs[name].add(y[:, :0], x)
    return inputs


def _device(encoder: nn.Module) -> torch.device:
    """Where it works."""
    return next(encoder.parameters()).device
