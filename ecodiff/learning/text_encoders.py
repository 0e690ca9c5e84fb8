"""Text encoders, pruned by what the denoiser is given of a prompt: its embeddings, pooled ones too.

The objective is that of the denoiser with the embeddings e in place of z_0: ||e(m) - e(1)||^2 over var e, a
mean over elements, summed over the tensors that the denoiser is given. Its Gauss-Newton metric takes a
backward pass through the text encoders for each prompt, and no denoiser call; order and repair are those of
`surgeon` and `compensate`. Layers that nothing is read of (`checkpoints.unused`) get no gradient and stay.
"""

from collections.abc import Callable, Mapping, Sequence
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
from ..machine import device_of
from ..pipelines import stream
from ..pruning.masking import masked
from ..pruning.scores import Scores
from ..units import PruneGroup
from .calibration import Call
from .conditioning import PROMPTS, Recording, conditioning, prompt_call
from .encodings import text_encoders
from .removal import Removal, merged
from .surgeon import Watched, gathered, ordered, readers

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

    Example:
        >>> encoders = ecodiff.rank_text_encoders(pipe, prompts)
        >>> small = ecodiff.variant(pipe, scores.plan(ratio=0.2).joined(encoders.plan(ratio=0.3)))

    Raises:
        UnsupportedModelError: the pipeline has no text encoders with heads or FFN neurons that are read.
    """
    config = config or Sampling()
    encoders = {name: _Encoder(model) for name, model in text_encoders(pipe).items()}
    asked = ["", *prompts][:PROMPTS]
    for number, prompt in enumerate(asked):
        if on_prompt is not None:
            on_prompt()
        call = prompt_call(pipe, prompt, config)
        with ExitStack() as watching:
            for encoder in encoders.values():
                watching.enter_context(Recording(encoder.model, encoder.calls))
                watching.enter_context(Watched(encoder.layers, encoder.metric))
            _add_sample(pipe, list(encoders.values()), call, stream("probe", config.seed, number))
    orders: list[list[Removal]] = []
    sizes: dict[str, int] = {}
    for name, encoder in encoders.items():
        for order in encoder.orders(len(asked)):
            orders.append([replace(removal, group=f"{name}.{removal.group}") for removal in order])
        sizes |= {f"{name}.{group.name}": group.size for group in encoder.read}
    if not sizes:
        raise UnsupportedModelError(
            f"The text encoders of this {type(pipe).__name__} have no heads or FFN neurons that are known."
        )
    return _scores({name: encoder.model for name, encoder in encoders.items()}, merged(orders, sizes))


class _Encoder:
    """A text encoder, its units, and what is summed up over prompts: squared gradients, G, calls."""

    def __init__(self, model: nn.Module):
        self.model = model
        try:
            self.groups = find_groups(model, KINDS)
        except UnsupportedModelError:
            self.groups = []
        self.layers = readers(model, self.groups)
        self.metric = {n: torch.zeros(len(m.weight), len(m.weight)) for n, m in self.layers.items()}
        self.plain = {group.name: torch.zeros(group.size) for group in self.groups}
        self.calls: list[Call] = []

    @property
    def read(self) -> list[PruneGroup]:
        """Groups that the embeddings depend on."""
        return [group for group in self.groups if self.plain[group.name].any()]

    def orders(self, prompts: int) -> list[list[Removal]]:
        """In which order units go, cluster by cluster, after so many prompts."""
        layers = readers(self.model, self.read)
        metric = {name: self.metric[name] / prompts for name in layers}
        plain = {group.name: self.plain[group.name] / prompts for group in self.read}
        gather = partial(gathered, self.model, self.calls)
        return ordered(self.model, self.read, layers, metric, plain, gather)[0]


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


def _add_sample(
    pipe: DiffusionPipeline, encoders: Sequence[_Encoder], call: dict, generator: torch.Generator
) -> None:
    """Add one random projection: the squared gradient of r . e with respect to every gate."""
    gates = [
        {g.name: torch.ones(g.size, device=device_of(each.model), requires_grad=True) for g in each.groups}
        for each in encoders
    ]
    with ExitStack() as masks:
        for each, own in zip(encoders, gates, strict=True):
            masks.enter_context(masked(each.model, own))
        total: Any = 0.0
        for e in conditioning(pipe, call):
            if e.numel() < 2:  # of an empty prompt there may be no token
                continue
            e = e.float()
            r = torch.randn(e.shape, generator=generator).to(e.device)
            total = total + (r * e).sum() / (e.detach().var() * e.numel()).sqrt().clamp_min(1e-12)
        if not isinstance(total, Tensor):
            return
        leaves = [gate for own in gates for gate in own.values()]
        found = iter(torch.autograd.grad(total, leaves, allow_unused=True))
    for each, own in zip(encoders, gates, strict=True):
        for name in own:
            if (gradient := next(found)) is not None:
                each.plain[name] += gradient.float().square().cpu()
