"""Directions inside attention heads, in the order that counts the repair.

With C = E[x x^T] of what a head gives, M = sum over its consumers of W^T G W (`surgeon`), and

    U S^2 U^T = C^1/2 M C^1/2,    Z = U^T C^-1/2,    Y = C^1/2 U,

Y Z = 1, the features of Z x are uncorrelated, and dropping feature j, not repaired by others, costs S_j^2.
In that basis (`pruning.heads`) a direction is a feature of its consumers like any other: it competes with
whole heads and neurons at one price, and what is left takes over from it.

Of what heads compare, C is E[q q^T] of a head's queries, M the metric of the queries themselves, and Y^T
turns the keys. The directions that stay are then the best approximation of the queries by as many (in the
metric M): nothing has to take over from those that go, and costs stay S_j^2.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..units import PruneGroup
from .candidates import Candidate, Consumer

DAMPING_OF_MOMENT, DAMPING_OF_METRIC = 1e-4, 1e-3  # as fractions of their mean diagonals


class Compared:
    """While it is open, sums up what `basis` needs of queries: q q^T and g g^T, by head.

    Attributes:
        sums: by "group|moment", "group|metric", (heads, width, width) each, and "group|rows", (), the number
            of queries.
    """

    def __init__(self, denoiser: nn.Module, groups: Sequence[PruneGroup]):
        self.denoiser, self.groups, self.sums = denoiser, groups, dict[str, Tensor]()
        for group in groups:
            shape = (group.size // group.width, group.width, group.width)
            self.sums |= {f"{group.name}|{what}": torch.zeros(shape) for what in ("moment", "metric")}
            self.sums[f"{group.name}|rows"] = torch.zeros(())

    def __enter__(self) -> None:
        self.handles = [
            self.denoiser.get_submodule(slot.module).register_forward_hook(partial(self._see, group))
            for group in self.groups
            for slot in group.producers
        ]

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, group: PruneGroup, module: nn.Module, given: tuple, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._add, group, output.detach()))

    def _add(self, group: PruneGroup, queries: Tensor, gradient: Tensor) -> None:
        for what, of in (("moment", queries), ("metric", gradient)):
            heads = of.detach().float().unflatten(-1, (-1, group.width)).flatten(0, -3).movedim(1, 0)
            self.sums[f"{group.name}|{what}"] += (heads.mT @ heads).cpu()
        self.sums[f"{group.name}|rows"] += gradient[..., 0].numel()

    def found(self, trajectories: int) -> dict[str, tuple[Tensor, Tensor]]:
        """C and M, by group."""
        found = {}
        for name in (group.name for group in self.groups):
            moment, metric, rows = (self.sums[f"{name}|{what}"] for what in ("moment", "metric", "rows"))
            found[name] = moment / rows.clamp_min(1), metric / trajectories
        return found


def basis(group: PruneGroup, read: list[tuple[Consumer, Tensor]]) -> tuple[Tensor, Tensor]:
    """Z, (units, width), and Y^T, (units, width), of all heads."""
    shape, where = (group.size // group.width, group.width, group.width), read[0][0].weight.device
    moment, metric = (torch.zeros(shape, device=where) for _ in range(2))
    for consumer, index in read:
        for features in index.T:  # heads that share values are read at several places
            at = features.view(-1, group.width).to(where)
            moment += consumer.moment[at[:, :, None], at[:, None, :]]
            w, gw = (m[:, at].movedim(0, 1) for m in (consumer.weight, consumer.metric_weight))
            metric += w.mT @ gw
    z, y, _ = turns(moment, metric)
    return z, y


def turns(moment: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z, (units, width), Y^T, (units, width), and S^2, (units,), from C and M, (heads, width, width) each."""
    moment, metric = _damped(moment, DAMPING_OF_MOMENT), _damped(metric, DAMPING_OF_METRIC)
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(1e-12 * float(values.max())).sqrt()[:, None]
    half, inverse = vectors * root @ vectors.mT, vectors / root @ vectors.mT
    costs, turned = torch.linalg.eigh(half @ metric @ half)
    z, y = (turned.mT @ inverse).flatten(0, 1).float(), (half @ turned).mT.flatten(0, 1).float()
    return z.cpu(), y.cpu(), costs.clamp_min(0).flatten().float().cpu()


def _damped(matrices: Tensor, damping: float) -> Tensor:
    matrices = matrices.double()
    each = damping * matrices.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-20)
    return matrices + each[:, None, None] * torch.eye(matrices.shape[1], device=matrices.device)


@dataclass
class Directions(Candidate):
    """Directions of heads that are left. The last one of a head goes with the head.

    Attributes:
        heads: their candidate; z, y: Z and Y^T of each, (units, width).
    """

    heads: Any = None
    z: Tensor = field(default_factory=lambda: torch.empty(0))
    y: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of_values(cls, group: PruneGroup, heads: Candidate, price: float) -> "Directions":
        """Turns the consumers of the heads, for all who read them."""
        pairs = zip(heads.read, group.consumers, strict=True)
        read = [(consumer, slot.index) for (consumer, _), slot in pairs]
        z, y = basis(group, read)
        for consumer, index in read:
            consumer.turn(index, z, y)
        found = cls(group, read, heads.coherence, price, heads=heads, z=z, y=y)
        heads.inside.append(found)
        return found

    @classmethod
    def of_queries(
        cls, group: PruneGroup, heads: Candidate, price: float, found: tuple[Tensor, Tensor], plain: Tensor
    ) -> "Directions":
        """Of what heads compare.

        Args:
            found: C and M.
            plain: what features cost, by the exact gradients of their gates: by how much they cost more than
                independent errors would, directions do too.
        """
        z, y, costs = turns(*found)
        alone = torch.mul(*(matrices.diagonal(dim1=1, dim2=2) for matrices in found)).flatten()
        coherence = float((plain / alone.clamp_min(1e-30)).mean())
        own = cls(group, [], coherence, price, plain=coherence * costs, heads=heads, z=z, y=y)
        heads.inside.append(own)
        return own

    @property
    def modules(self) -> set[int]:
        return self.heads.modules

    def refresh(self) -> None:
        heads = self.left // self.group.width
        self.left = self.left[torch.isin(heads, self.heads.left)]
        super().refresh()

    def _chosen(self, worth: Tensor, count: int) -> Tensor:
        order = worth.argsort(stable=True)
        heads = self.left[order] // self.group.width
        # The most important of each head is the last of its own in a rising order.
        places = torch.full((self.heads.group.size,), -1)
        places.scatter_reduce_(0, heads, torch.arange(len(order)), "amax")
        may = torch.ones(len(order), dtype=torch.bool)
        may[places[places >= 0]] = False
        return order[may][:count]

    def gone(self) -> Tensor:
        """How many of each head that is left are gone, (heads,)."""
        stay = torch.bincount(self.left // self.group.width, minlength=self.heads.group.size)
        return self.group.width - stay[self.heads.left]
