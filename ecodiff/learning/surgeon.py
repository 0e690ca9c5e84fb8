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
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups, unit_parameters
from ..pipelines import denoiser_calls, denoiser_of, moved, stream
from ..units import ALL_KINDS, PRESET_KINDS
from .calibration import Call, Statistics, seen
from .candidates import Candidate, Consumer, solved
from .directions import sampled
from .gauss_newton import gauss_newton_sample
from .inside_heads import Directions
from .scoring import Values, method

SURGEON_KINDS = (*PRESET_KINDS, "modulation_directions", "value_directions")
CALLS = 6  # denoiser calls of each batch that A is gathered over, evenly spread


@method(
    "surgeon",
    "Optimal Brain Surgeon, greedy, Gauss-Newton metric (LLM Surgeon, ZipLM, OSSCAR)",
    cost=5,
    wide=True,
    kinds=SURGEON_KINDS,
    batches=12,
)
def surgeon(
    pipe: DiffusionPipeline,
    calls: Iterable[dict],
    seed: int = 0,
    prompts: Sequence[str] = (),
    on_step: Callable[[], None] | None = None,
    kinds: Sequence[str] = SURGEON_KINDS,
) -> Values:
    """Units by when they are removed, as a number that rises: the first has the least.

    Args:
        calls: arguments of the pipeline, one dict a batch of trajectories.
        prompts: what directions are found from; some hundreds. None: they are the features themselves.
        on_step: called before every denoiser call; raise in it to stop.
        kinds: of units that may go.
    """
    denoiser = denoiser_of(pipe)
    every = find_groups(denoiser, kinds)
    groups = [group for group in every if not group.inside]
    layers = {
        slot.module: denoiser.get_submodule(slot.module)
        for g in groups
        for slot in g.consumers
        if solved(slot) and not g.activations
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
    candidates = {g.name: Candidate.of(g, consumers, plain[g.name], prices[g.name]) for g in groups}
    inside = {
        g.name: Directions.of(g, candidates[g.inside], float(unit_parameters(denoiser, g)))
        for g in every
        if g.inside in candidates and candidates[g.inside].read
    }
    found = Values(removal_order([*candidates.values(), *inside.values()]))
    found.bases = bases | {name: (each.z, each.y.T) for name, each in inside.items()}
    return found


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
        if isinstance(inside := cheapest.inside, Directions):  # they go with their head
            went = inside.left[torch.isin(inside.left // inside.group.width, block)]
            values[inside.group.name][went] = (gone + 0.5) / units
        for candidate in candidates:
            if candidate is cheapest or shared & candidate.modules:
                candidate.refresh()


def statistics_bytes(denoiser: nn.Module) -> int:
    """What the statistics of all consumers take in memory, about: covariance, its inverse, moment, metric."""
    total = 0
    groups = [g for g in find_groups(denoiser, ALL_KINDS) if not (g.activations or g.inside)]
    slots = [slot for group in groups for slot in group.consumers]
    for name in {slot.module for slot in slots if solved(slot)}:
        layer: Any = denoiser.get_submodule(name)
        out, features = len(layer.weight), layer.weight[0].numel()
        total += 4 * (3 * features**2 + out**2 + 2 * out * features)
    return total
