"""Removal one block after another, and the orders of layers that share nothing merged into one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from torch import Tensor

from .candidates import Candidate
from .inside_heads import Directions


@dataclass
class Removal:
    """A block of units of a group, what it costs per parameter, and what goes with it inside those heads."""

    cost: float
    group: str
    units: Tensor
    inside: str = ""
    within: Tensor | None = None


@torch.no_grad()
def removals(candidates: Sequence[Candidate]) -> Iterator[Removal]:
    """The cheapest block of all candidates, again and again, until none is left."""
    while True:
        cheapest = min(candidates, key=lambda c: c.cost)
        if not len(cheapest.block):
            return
        found = Removal(cheapest.cost, cheapest.group.name, cheapest.take())
        if isinstance(inside := cheapest.inside, Directions):
            went = torch.isin(inside.left // inside.group.width, found.units)
            found.inside, found.within = inside.group.name, inside.left[went]
        yield found
        for candidate in candidates:
            if candidate is cheapest or cheapest.modules & candidate.modules:
                candidate.refresh()


def merged(orders: Sequence[list[Removal]], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """{group: float32 (units,)}: what each unit costs per parameter when it goes, if of all clusters the
    cheapest next block goes first.

    They rise in that order, a unit by one unit in the last place at least, so every size in parameters is a
    prefix of it. As costs they can be counted per something else.
    """
    values, level = {name: np.full(size, np.nan, np.float32) for name, size in sizes.items()}, np.float32(0)
    heads = [(order[0].cost, index, 0) for index, order in enumerate(orders) if order]
    heapify(heads)
    while heads:
        _, index, at = heappop(heads)
        removal = orders[index][at]
        for unit in removal.units.tolist():
            level = max(np.float32(removal.cost), np.nextafter(level, np.float32(np.inf)))
            values[removal.group][unit] = level
        if removal.within is not None:
            values[removal.inside][removal.within.numpy()] = np.nextafter(level, np.float32(np.inf))
        if at + 1 < len(orders[index]):
            heappush(heads, (orders[index][at + 1].cost, index, at + 1))
    # What no removal was found for goes last.
    return {name: torch.from_numpy(np.nan_to_num(value, nan=10 * level)) for name, value in values.items()}
