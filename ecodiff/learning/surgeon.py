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
a matrix of 0.9 GB in float32. Layers without consumers in common are ordered one after another, and their
orders merged by price, which is the order of all together; so memory holds a few layers' covariances, and
the metric of all (`statistics_bytes`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups, unit_parameters
from ..config import HEAL_REPAIR, PRESETS
from ..machine import device_of, room
from ..pipelines import denoiser_calls, denoiser_of, stream
from ..units import ALL_KINDS, PRESET_KINDS, PruneGroup
from .calibration import Call, Statistics, load, save, seen
from .candidates import Candidate, Consumer, place, solved
from .directions import sampled
from .gauss_newton import gauss_newton_sample
from .inside_heads import Compared, Directions
from .progress import Progress
from .removal import Removal, merged, packed, removals, unpacked
from .scoring import Values, method

SURGEON_KINDS = (*PRESET_KINDS, "modulation_directions", "value_directions", "query_directions")
TURN = 4 << 30  # bytes of covariances that are gathered at a time
CALLS = 6  # denoiser calls of each batch that A is gathered over, evenly spread


@method(
    "surgeon",
    "Optimal Brain Surgeon, greedy, Gauss-Newton metric (LLM Surgeon, ZipLM, OSSCAR)",
    cost=5,
    passes=3.5,  # one to record what layers read, and half a one to gather it
    orders=2,
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
    kept: Progress | None = None,
) -> Values:
    """Units by what they cost per parameter when it is their turn to go, a number that rises in that order.

    Args:
        calls: arguments of the pipeline, one dict a batch of trajectories.
        prompts: what directions are found from; some hundreds. None: they are the features themselves.
        on_step: called before every denoiser call; raise in it to stop.
        kinds: of units that may go.
        kept: where what was done is kept; covariances of what layers read are gathered again.
    """
    denoiser = denoiser_of(pipe)
    every = find_groups(denoiser, kinds)
    groups = [group for group in every if not group.inside]
    layers = readers(denoiser, groups)
    metric = {name: torch.zeros(len(layer.weight), len(layer.weight)) for name, layer in layers.items()}
    compared = Compared(denoiser, [group for group in every if group.kind == "query_directions"])
    gated = [*groups, *compared.groups]
    calls, recorded, kept = list(calls), list[Call](), kept or Progress()

    def file(index: int) -> Path | None:
        return kept.file(f"calls-{index}") if kept.pauses else None

    def record(index: int, call: dict) -> None:
        made = _recorded(pipe, call, on_step)
        if (place := file(index)) is not None:
            save(place, made)
        recorded.extend(made)

    def again(index: int, call: dict) -> None:
        kept_at = file(index)
        made = load(kept_at) if kept_at else None
        if made is None:
            record(index, call)
        else:
            recorded.extend(made)

    def sample(index: int, call: dict) -> dict[str, Tensor]:
        # Recorded anew even if a killed call had done so: its generators go on from there.
        record(index, call)
        with Watched(layers, metric), compared:
            return gauss_newton_sample(pipe, gated, call, stream("probe", seed, index), on_step=on_step)

    plain, bases = sampled(pipe, gated, calls, prompts, seed, sample, kept, metric | compared.sums, again)
    trajectories = sum(len(call["prompt"]) for call in calls)
    metric = {name: total / trajectories for name, total in metric.items()}
    gather = partial(gathered, denoiser, recorded, on_step=on_step)
    queries = compared.found(trajectories)
    orders, inside = ordered(denoiser, every, layers, metric, plain, gather, kept, queries)
    found = Values(merged(orders, {g.name: g.size for g in every}))
    found.bases = bases | inside
    found.others = {"gauss-newton": _diagonal(denoiser, every, plain, bases)}
    return found


# The same on four times the trajectories, for whoever can wait.
PRESETS["thorough"] = PRESETS["surgeon"] | {"warm_steps": 48, "repair": HEAL_REPAIR}


@torch.no_grad()
def ordered(
    model: nn.Module,
    every: Sequence[PruneGroup],
    layers: Mapping[str, Any],
    metric: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    gather: Callable[[Sequence[str]], dict[str, Statistics]],
    kept: Progress | None = None,
    queries: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({}),
) -> tuple[list[list[Removal]], dict[str, tuple[Tensor, Tensor]]]:
    """The order of each cluster of a model's groups, and (Z, Y) of directions inside its heads.

    Args:
        layers: consumers, by path (`readers`).
        metric: G of each.
        plain: what units cost unrepaired, by the exact gradients of their gates.
        gather: what some of the layers read.
        kept: where each cluster's order is kept.
        queries: C and M of what heads compare, by group of directions (`inside_heads`).

    Raises:
        Paused: the time of this call is up.
    """
    kept, every_cluster = kept or Progress(), clusters(every, layers)
    found = {cluster[0].name: kept.load(f"order-{cluster[0].name}")[1] for cluster in every_cluster}
    left = [cluster for cluster in every_cluster if not found[cluster[0].name]]
    for turn in _turns(left, layers, room(device_of(model), TURN)):
        names = [name for cluster in turn for name in _read_by(cluster, layers)]
        inputs = gather(names)
        for cluster in turn:
            where = place(model, [layers[name] for name in _read_by(cluster, layers)])
            consumers = {
                name: Consumer.of(layers[name], inputs.pop(name), metric[name], where)
                for name in _read_by(cluster, layers)
                if inputs[name].rows
            }
            prices = {g.name: float(max(1, unit_parameters(model, g))) for g in cluster}
            heads = [g for g in cluster if not g.inside]
            candidates = {g.name: Candidate.of(g, consumers, plain[g.name], prices[g.name]) for g in heads}
            inside = {}
            for group in (g for g in cluster if g.inside in candidates and candidates[g.inside].read):
                of = group, candidates[group.inside], prices[group.name]
                inside[group.name] = (
                    Directions.of_queries(*of, queries[group.name], plain[group.name])
                    if group.name in queries
                    else Directions.of_values(*of)
                )
            order = list(removals([*candidates.values(), *inside.values()]))
            part = found[cluster[0].name] = packed(order, cluster, inside)
            kept.keep(f"order-{cluster[0].name}", part)
    orders: list[list[Removal]] = []
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for cluster in every_cluster:
        order, own = unpacked(found[cluster[0].name], cluster)
        orders.append(order)
        bases |= own
    return orders, bases


def _diagonal(
    denoiser: nn.Module, groups: Sequence[PruneGroup], plain: Mapping[str, Tensor], bases: Mapping[str, Any]
) -> Values:
    """The order of the Gauss-Newton diagonal. It does not rank directions inside heads: they go with them."""
    found = Values({g.name: plain[g.name] / unit_parameters(denoiser, g) for g in groups if not g.inside})
    last = 10 * max(float(values.max()) for values in found.values())
    found.update({g.name: torch.full((g.size,), last) for g in groups if g.inside})
    found.bases = dict(bases)
    return found


def readers(denoiser: nn.Module, groups: Sequence[PruneGroup]) -> dict[str, Any]:
    """The consumers whose repair can be counted in, by path, in network order."""
    slots = [slot for group in groups for slot in group.consumers if solved(slot) and not group.activations]
    layers = {slot.module: denoiser.get_submodule(slot.module) for slot in slots}
    return {name: layer for name, layer in layers.items() if isinstance(layer, (nn.Linear, nn.Conv2d))}


def _read_by(groups: Sequence[PruneGroup], layers: Mapping[str, Any]) -> list[str]:
    """Which of `layers` read the units of groups."""
    slots = [slot for group in groups if not group.activations for slot in group.consumers if solved(slot)]
    return list(dict.fromkeys(slot.module for slot in slots if slot.module in layers))


def clusters(groups: Sequence[PruneGroup], layers: Mapping[str, Any]) -> list[list[PruneGroup]]:
    """Groups that have consumers in common, together: removals in one cluster change no prices in another."""
    found: list[tuple[set[str], list[PruneGroup]]] = []
    for group in groups:
        # What is inside heads goes with them, whoever reads it.
        names, members = {*_read_by([group], layers), group.inside or group.name}, [group]
        for other in [cluster for cluster in found if cluster[0] & names]:
            found.remove(other)
            names, members = names | other[0], other[1] + members
        found.append((names, members))
    return [members for _, members in found]


def _turns(
    every: Sequence[list[PruneGroup]], layers: Mapping[str, Any], most: int
) -> Iterator[list[list[PruneGroup]]]:
    """Clusters, as many at a time as their inputs' covariances fit into so many bytes; one at least."""
    turn: list[list[PruneGroup]] = []
    taken = 0
    for cluster in every:
        need = sum(4 * layers[name].weight[0].numel() ** 2 for name in _read_by(cluster, layers))
        if turn and taken + need > most:
            yield turn
            turn, taken = [], 0
        turn.append(cluster)
        taken += need
    if turn:
        yield turn


@torch.no_grad()
def _recorded(pipe: DiffusionPipeline, call: dict, on_step: Callable[[], None] | None) -> list[Call]:
    """Some of the denoiser's calls in dense trajectories, evenly spread over the time steps."""
    made = denoiser_calls(pipe, call, on_step=on_step)
    chosen = torch.linspace(0, len(made) - 1, min(CALLS, len(made))).round().long().unique()
    return [Call(made[index][0], made[index][1], False) for index in chosen.tolist()]


@torch.no_grad()
def gathered(
    denoiser: nn.Module,
    recorded: Sequence[Call],
    names: Sequence[str],
    on_step: Callable[[], None] | None = None,
) -> dict[str, Statistics]:
    """Covariances of what layers read in recorded calls."""
    inputs: dict[str, Statistics] = {name: Statistics() for name in names}
    for call in recorded if names else ():
        if on_step is not None:
            on_step()
        for name, (x, y) in seen(denoiser, call, names).items():
            inputs[name].add(y[:, :0], x)
    return inputs


class Watched:
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


def statistics_bytes(denoiser: nn.Module) -> int:
    """What all of it takes in memory, about: the metric of all consumers, twice while it is summed up; then
    the covariances of a turn, and of the largest cluster all that it works on: covariance, its inverse,
    moment and a copy."""
    groups = [group for group in find_groups(denoiser, ALL_KINDS) if not group.inside]
    layers = readers(denoiser, groups)
    squares = {name: 4 * layer.weight[0].numel() ** 2 for name, layer in layers.items()}
    metric = sum(4 * len(layer.weight) ** 2 for layer in layers.values())
    largest = max(sum(squares[n] for n in _read_by(c, layers)) for c in clusters(groups, layers))
    return metric + max(metric, max(largest, min(TURN, sum(squares.values()))) + 4 * largest)
