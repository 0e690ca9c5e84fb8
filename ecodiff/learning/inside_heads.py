"""Directions inside attention heads, in the order that counts the repair.

With C = E[x x^T] of what a head gives, M = sum over its consumers of W^T G W (`surgeon`), and

    U S^2 U^T = C^1/2 M C^1/2,    Z = U^T C^-1/2,    Y = C^1/2 U,

Y Z = 1, the features of Z x are uncorrelated, and dropping feature j, not repaired by others, costs S_j^2.
In that basis (`pruning.heads`) a direction is a feature of its consumers like any other: it competes with
whole heads and neurons at one price, and what is left takes over from it.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..units import PruneGroup
from .candidates import Candidate, Consumer

DAMPING_OF_MOMENT, DAMPING_OF_METRIC = 1e-4, 1e-3  # as fractions of their mean diagonals


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
    moment, metric = _damped(moment, DAMPING_OF_MOMENT), _damped(metric, DAMPING_OF_METRIC)
    values, vectors = torch.linalg.eigh(moment)
    root = values.clamp_min(1e-12 * float(values.max())).sqrt()[:, None]
    half, inverse = vectors * root @ vectors.mT, vectors / root @ vectors.mT
    _, turns = torch.linalg.eigh(half @ metric @ half)
    z, y = (turns.mT @ inverse).flatten(0, 1).float(), (half @ turns).mT.flatten(0, 1).float()
    return z.cpu(), y.cpu()


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
