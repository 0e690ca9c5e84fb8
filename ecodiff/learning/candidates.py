"""What an order of removal that counts the repair chooses from: groups of units, and what reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..machine import device_of, room
from ..pruning.heads import turned
from ..units import KINDS, PruneGroup, Slot
from .calibration import Statistics

if TYPE_CHECKING:
    from .inside_heads import Directions

DAMPING = 0.05  # e, as a fraction of the mean variance of a feature: that of compensation


def solved(slot: Slot) -> bool:
    """True for consumers that repair can be counted in: not packed experts, not scattered outputs."""
    return slot.axis == "in" and slot.bare is None


def place(model: nn.Module, layers: Sequence[Any]) -> torch.device:
    """Where layers are ordered: on the model's device if their matrices take at most half of what is free."""
    device = device_of(model)
    sizes = [(layer.weight[0].numel(), len(layer.weight)) for layer in layers]
    need = sum(4 * 4 * features * (features + out) for features, out in sizes)
    # MPS has no float64, in which eigenvalues are found.
    there = device.type not in ("mps", "meta") and room(device, need) == need
    return device if there else torch.device("cpu")


@dataclass
class Consumer:
    """A layer that reads units' features, as far as they are removed: weights, inverse covariance, metric.

    All on one device. Indices are on the CPU, and so is what `costs` gives.
    """

    weight: Tensor  # W, (out, features)
    inverse: Tensor  # P, (features, features)
    metric_weight: Tensor  # G W, (out, features)
    moment: Tensor  # E[x x^T], (features, features)
    each: int  # features of an input channel: the places of a convolution's kernel

    @classmethod
    def of(cls, layer: Any, inputs: Statistics, metric: Tensor, device: torch.device | str) -> "Consumer":
        weight = layer.weight.detach().float().flatten(1).to(device).clone()  # it is changed here
        covariance, _ = inputs.covariances(centred=layer.bias is not None)
        damping = DAMPING * covariance.diagonal().mean().clamp_min(1e-12)
        damped = covariance.to(device) + float(damping) * torch.eye(len(covariance), device=device)
        inverse = torch.linalg.inv(damped)
        moment = (inputs.xx / inputs.rows).to(device)
        return cls(weight, inverse, metric.to(device) @ weight, moment, layer.weight[0, 0].numel())

    def features(self, index: Tensor) -> Tensor:
        """Features of input channels, (..., channels) to (..., channels * each), on the matrices' device."""
        places = (index[..., None] * self.each + torch.arange(self.each)).flatten(-2)
        return places.to(self.weight.device)

    def costs(self, index: Tensor) -> Tensor:
        """What removing each unit costs, (units,), of `index` (units, channels)."""
        places = self.features(index)
        if places.shape[1] == 1:
            at = places[:, 0]
            costs = (self.weight[:, at] * self.metric_weight[:, at]).sum(0)
            return (costs / self.inverse.diagonal()[at]).cpu()
        own = self.inverse[places[:, :, None], places[:, None, :]]
        w, gw = (m[:, places].movedim(0, 1) for m in (self.weight, self.metric_weight))
        return (torch.linalg.inv(own) * (w.transpose(1, 2) @ gw)).sum((1, 2)).cpu()

    def unrepaired(self, index: Tensor) -> float:
        """What removing all units one at a time costs in sum if nothing takes over, of `index` as above."""
        places = self.features(index)
        w, gw = (m[:, places].movedim(0, 1) for m in (self.weight, self.metric_weight))
        own = self.moment[places[:, :, None], places[:, None, :]]
        return float((own * (w.transpose(1, 2) @ gw)).sum())

    def turn(self, index: Tensor, z: Tensor, y: Tensor) -> None:
        """Rewrite it in another basis of each head's features, x to Z x and W to W Y.

        Args:
            index: (units, copies); z, y: Z and Y^T of each head, (units, width).
        """
        self.weight = turned(self.weight.T, index, y).T.contiguous()
        self.metric_weight = turned(self.metric_weight.T, index, y).T.contiguous()
        self.inverse = turned(turned(self.inverse, index, y).T.contiguous(), index, y)
        self.moment = turned(turned(self.moment, index, z).T.contiguous(), index, z)

    def remove(self, index: Tensor) -> None:
        """Take the features of units (units, channels) away; what is left takes over."""
        at = self.features(index).flatten()
        solved = torch.linalg.solve(self.inverse[at][:, at], self.inverse[at])  # (P_SS)^-1 P_S:
        solved[:, at] = torch.eye(len(at), device=solved.device)
        for matrix in (self.weight, self.metric_weight, self.inverse):  # large ones, so in place
            matrix.addmm_(matrix[:, at], solved, alpha=-1)
        # What is gone is zero but for its own variance, so that nothing divides by it.
        self.inverse[at] = 0
        self.inverse[:, at] = 0
        self.inverse[at, at] = 1


@dataclass
class Candidate:
    """A group of units that are left, and what they cost now.

    Attributes:
        read: the consumers and the features of units in each; none: `plain` is all there is.
        coherence: errors of a layer add up over tokens and steps, which the metric takes for independent.
            By how much they do is what the exact gradients of the gates say.
        price: parameters of a unit.
        plain: what units cost, unrepaired.
        inside: directions inside them, if those are ranked too.
        left: numbers of the units that are left.
    """

    group: PruneGroup
    read: list[tuple[Consumer, Tensor]]
    coherence: float
    price: float
    plain: Tensor = field(default_factory=lambda: torch.empty(0))
    inside: "list[Directions]" = field(default_factory=list)

    def __post_init__(self):
        self.left = torch.arange(self.group.size)
        aligned = KINDS[self.group.kind].aligned
        self.width = (64 if self.group.size >= 1024 else min(8, self.group.size)) if aligned else 1
        self.refresh()

    @classmethod
    def of(
        cls, group: PruneGroup, consumers: dict[str, Consumer], plain: Tensor, price: float
    ) -> "Candidate":
        read = [
            (consumers[s.module], s.index) for s in group.consumers if solved(s) and s.module in consumers
        ]
        # Only if all that read it can be solved for.
        read = [] if group.activations or len(read) != len(group.consumers) else read
        alone = sum(consumer.unrepaired(index) for consumer, index in read)
        return cls(group, read, float(plain.sum()) / alone if alone > 0 else 1.0, price, plain)

    @property
    def modules(self) -> set[int]:
        """The consumers, for finding out who shares them."""
        return {id(consumer) for consumer, _ in self.read}

    def refresh(self) -> None:
        """Find the block that would go next, and its price per parameter."""
        self.block, self.cost = self.left[:0], float("inf")
        if not len(self.left):
            return
        worth = self._costs() / self._prices()
        whole = len(self.left) == self.group.size
        order = self._chosen(worth, self.group.size % self.width or self.width if whole else self.width)
        if len(order):
            self.block, self.cost = self.left[order], float(worth[order].mean())

    def _chosen(self, worth: Tensor, count: int) -> Tensor:
        return worth.argsort(stable=True)[:count]

    def _prices(self) -> Tensor:
        """Parameters that go with each unit that is left."""
        prices = torch.full((len(self.left),), self.price)
        for inside in self.inside:
            prices = prices - inside.price * inside.gone()
        return prices

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
