"""An order of removal that counts the repair: Optimal Brain Surgeon for whole units, greedily.

Scores of single units miss that the weights which stay are repaired afterwards: two units that say the same
both look free, and both go. Here units are removed one block after another, the cheapest first, and after
every removal the weights of its consumers and the prices of all other units are those of the repaired layer.

A consumer is y = W x + b. With A = cov(x) + e I over dense calls, P = A^-1 on the features that are left, and
G = E[sum over tokens and steps of g g^T], g the gradient of a random projection of z_0 with respect to y (the
Gauss-Newton metric of the objective, in its unit), removing the features S of a unit costs, repaired,

    tr(W_S^T G W_S (P_SS)^-1),

and leaves W - W_S (P_SS)^-1 P_S: and P - P_:S (P_SS)^-1 P_S:. Sums over the unit's consumers, divided by its
parameters, are its price. The metric is that of LLM Surgeon (arXiv 2312.17244), the greedy updates are those
of ZipLM (arXiv 2302.04089) and OSSCAR (arXiv 2403.12983).

A block of k features of n costs n^2 k operations for P and n k out for W: n = 15,360 and k = 64, 15 GFLOP and
a matrix of 0.9 GB in float32.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups, unit_parameters
from ..pipelines import denoiser_calls, denoiser_of, moved, stream
from ..units import ALL_KINDS, KINDS, PRESET_KINDS, PruneGroup
from .calibration import Call, Statistics, seen
from .directions import sampled
from .gauss_newton import gauss_newton_sample
from .scoring import Values, method

DAMPING = 0.05  # e, as a fraction of the mean variance of a feature: that of compensation
CALLS = 6  # denoiser calls of each batch that A is gathered over, evenly spread


@method(
    "surgeon",
    "Optimal Brain Surgeon, greedy, Gauss-Newton metric (LLM Surgeon, ZipLM, OSSCAR)",
    cost=5,
    wide=True,
    kinds=(*PRESET_KINDS, "modulation_directions"),
    batches=12,
)
def surgeon(
    pipe: DiffusionPipeline,
    calls: Iterable[dict],
    seed: int = 0,
    prompts: Sequence[str] = (),
    on_step: Callable[[], None] | None = None,
) -> Values:
    """Units by when they are removed, as a number that rises: the first has the least.

    Args:
        calls: arguments of the pipeline, one dict a batch of trajectories.
        prompts: what directions are found from; some hundreds. None: they are the features themselves.
        on_step: called before every denoiser call; raise in it to stop.
    """
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser, ALL_KINDS)
    layers = {
        slot.module: denoiser.get_submodule(slot.module)
        for g in groups
        for slot in g.consumers
        if _solved(slot) and not g.activations
    }
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    inputs: dict[str, Statistics] = {name: Statistics() for name in layers}
    metric = {name: torch.zeros(len(layer.weight), len(layer.weight)) for name, layer in layers.items()}
    calls = list(calls)

    def sample(index: int, call: dict) -> dict[str, Tensor]:
        _gather_inputs(pipe, call, inputs, on_step)
        with _Watched(layers, metric):
            return gauss_newton_sample(pipe, groups, call, stream("probe", seed, index), on_step=on_step)

    plain, bases = sampled(pipe, groups, calls, prompts, seed, sample)
    trajectories = sum(len(call["prompt"]) for call in calls)
    consumers = {
        name: Consumer.of(layer, inputs[name], metric[name] / trajectories)
        for name, layer in layers.items()
        if inputs[name].rows
    }
    prices = {group.name: float(max(1, unit_parameters(denoiser, group))) for group in groups}
    candidates = [Candidate(g, consumers, plain[g.name], prices[g.name]) for g in groups]
    found = Values(removal_order(candidates))
    found.bases = bases
    return found


def _solved(slot) -> bool:
    """True for consumers that repair can be counted in: not packed experts, not scattered outputs."""
    return slot.axis == "in" and slot.bare is None


@torch.no_grad()
def _gather_inputs(
    pipe: DiffusionPipeline, call: dict, inputs: dict[str, Statistics], on_step: Callable[[], None] | None
) -> None:
    made = denoiser_calls(pipe, call, on_step=on_step)
    chosen = torch.linspace(0, len(made) - 1, min(CALLS, len(made))).round().long().unique()
    for index in chosen.tolist():
        args, kwargs = moved(made[index], denoiser_of(pipe).device)
        for name, (x, y) in seen(denoiser_of(pipe), Call(args, kwargs, False), list(inputs)).items():
            inputs[name].add(y[:, :0], x)


class _Watched:
    """While it is open, gradients of layers' outputs are summed up as g g^T."""

    def __init__(self, layers: dict[str, nn.Module], metric: dict[str, Tensor]):
        self.layers, self.metric = layers, metric

    def __enter__(self) -> None:
        self.handles = [m.register_forward_hook(partial(self._see, n)) for n, m in self.layers.items()]

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, name: str, module: nn.Module, given: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, name, 1 if isinstance(module, nn.Conv2d) else -1))

    def _add(self, name: str, features: int, gradient: Tensor) -> None:
        rows = gradient.detach().float().movedim(features, -1).flatten(0, -2)
        self.metric[name] += (rows.T @ rows).to(self.metric[name].device)


@dataclass
class Consumer:
    """A layer that reads units' features, as far as they are removed: weights, inverse covariance, metric."""

    weight: Tensor  # W, (out, features)
    inverse: Tensor  # P, (features, features)
    metric_weight: Tensor  # G W, (out, features)
    moment: Tensor  # E[x x^T], (features, features)
    each: int  # features of an input channel: the places of a convolution's kernel

    @classmethod
    def of(cls, layer: Any, inputs: Statistics, metric: Tensor) -> "Consumer":
        weight = layer.weight.detach().float().flatten(1).cpu().clone()  # it is changed here
        covariance, _ = inputs.covariances(centred=layer.bias is not None)
        damping = DAMPING * covariance.diagonal().mean().clamp_min(1e-12)
        damped = covariance.cpu() + float(damping) * torch.eye(len(covariance))
        inverse = torch.linalg.inv(damped)
        moment = (inputs.xx / inputs.rows).cpu()
        return cls(weight, inverse, metric @ weight, moment, layer.weight[0, 0].numel())

    def features(self, index: Tensor) -> Tensor:
        """Features of input channels, (..., channels) to (..., channels * each)."""
        return (index[..., None] * self.each + torch.arange(self.each)).flatten(-2)

    def costs(self, index: Tensor) -> Tensor:
        """What removing each unit costs, (units,), of `index` (units, channels)."""
        places = self.features(index)
        if places.shape[1] == 1:
            at = places[:, 0]
            return (self.weight[:, at] * self.metric_weight[:, at]).sum(0) / self.inverse.diagonal()[at]
        own = self.inverse[places[:, :, None], places[:, None, :]]
        w, gw = (m[:, places].movedim(0, 1) for m in (self.weight, self.metric_weight))
        return (torch.linalg.inv(own) * (w.transpose(1, 2) @ gw)).sum((1, 2))

    def unrepaired(self, index: Tensor) -> float:
        """What removing all units one at a time costs in sum if nothing takes over, of `index` as above."""
        places = self.features(index)
        w, gw = (m[:, places].movedim(0, 1) for m in (self.weight, self.metric_weight))
        own = self.moment[places[:, :, None], places[:, None, :]]
        return float((own * (w.transpose(1, 2) @ gw)).sum())

    def remove(self, index: Tensor) -> None:
        """Take the features of units (units, channels) away; what is left takes over."""
        at = self.features(index).flatten()
        solved = torch.linalg.solve(self.inverse[at][:, at], self.inverse[at])  # (P_SS)^-1 P_S:
        solved[:, at] = torch.eye(len(at))
        self.weight -= self.weight[:, at] @ solved
        self.metric_weight -= self.metric_weight[:, at] @ solved
        self.inverse -= self.inverse[:, at] @ solved
        # What is gone is zero but for its own variance, so that nothing divides by it.
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        self.inverse[at, at] = 1


class Candidate:
    """A group of units that are left, and what they cost now."""

    def __init__(self, group: PruneGroup, consumers: dict[str, Consumer], plain: Tensor, price: float):
        self.group, self.plain, self.price = group, plain, price
        read = [slot for slot in group.consumers if _solved(slot) and slot.module in consumers]
        read = [] if group.activations else read
        # Only if all that read it can be solved for: else the plain score is all there is.
        self.read = (
            [(consumers[slot.module], slot.index) for slot in read]
            if len(read) == len(group.consumers)
            else []
        )
        self.left = torch.arange(group.size)
        # Errors of a layer add up over tokens and steps, which the metric takes for independent. By how much
        # they do is what the exact gradients of the gates say.
        alone = sum(consumer.unrepaired(index) for consumer, index in self.read)
        self.coherence = float(plain.sum()) / alone if alone > 0 else 1.0
        aligned = KINDS[group.kind].aligned
        self.width = (64 if group.size >= 1024 else min(8, group.size)) if aligned else 1
        self.refresh()

    @property
    def modules(self) -> set[int]:
        """The consumers, for finding out who shares them."""
        return {id(consumer) for consumer, _ in self.read}

    def refresh(self) -> None:
        """Find the block that would go next, and its price per parameter."""
        if not len(self.left):
            self.block, self.cost = self.left, float("inf")
            return
        costs = self._costs()
        count = (
            (self.group.size % self.width or self.width) if len(self.left) == self.group.size else self.width
        )
        order = costs.argsort(stable=True)[: min(count, len(self.left))]
        self.block = self.left[order]
        self.cost = float(costs[order].mean()) / self.price

    def _costs(self) -> Tensor:
        if not self.read:
            return self.plain[self.left]
        found = sum(consumer.costs(index[self.left]) for consumer, index in self.read)
        assert isinstance(found, Tensor)
        return self.coherence * found.clamp_min(0)

    def take(self) -> Tensor:
        """Remove the block; returns its units."""
        block = self.block
        for consumer, index in self.read:
            consumer.remove(index[block])
        self.left = self.left[~torch.isin(self.left, block)]
        return block


@torch.no_grad()
def removal_order(candidates: Sequence[Candidate]) -> dict[str, Tensor]:
    """{group: (units,)}: when each unit goes, rising; every size is a prefix of one order."""
    values = {c.group.name: torch.zeros(c.group.size) for c in candidates}
    units = sum(c.group.size for c in candidates)
    gone = 0
    while True:
        cheapest = min(candidates, key=lambda c: c.cost)
        if not len(cheapest.block):
            return values
        block = cheapest.take()
        values[cheapest.group.name][block] = (gone + 1 + torch.arange(len(block))) / units
        gone += len(block)
        shared = cheapest.modules
        for candidate in candidates:
            if candidate is cheapest or shared & candidate.modules:
                candidate.refresh()


def statistics_bytes(denoiser: nn.Module) -> int:
    """What the statistics of all consumers take in memory, about: covariance, its inverse, moment, metric."""
    total = 0
    slots = [s for g in find_groups(denoiser, ALL_KINDS) if not g.activations for s in g.consumers]
    for name in {slot.module for slot in slots if _solved(slot)}:
        layer: Any = denoiser.get_submodule(name)
        out, features = len(layer.weight), layer.weight[0].numel()
        total += 4 * (3 * features**2 + out**2 + 2 * out * features)
    return total
