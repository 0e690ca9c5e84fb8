"""Removal one block after another, and the orders of layers that share nothing merged into one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np
import torch
from torch import Tensor

from ..units import PruneGroup
from .candidates import Candidate
from .inside_heads import Directions


@dataclass
class Removal:
    """A block of units of a group, what it costs per parameter, and what goes with it inside those heads."""

    cost: float
    group: str
    units: Tensor
    within: dict[str, Tensor] = field(default_factory=dict)  # units by group of directions


@torch.no_grad()
def removals(candidates: Sequence[Candidate]) -> Iterator[Removal]:
    """The cheapest block of all candidates, again and again, until none is left."""
    while True:
        cheapest = min(candidates, key=lambda c: c.cost)
        if not len(cheapest.block):
            return
        found = Removal(cheapest.cost, cheapest.group.name, cheapest.take())
        for inside in cheapest.inside:
            went = torch.isin(inside.left // inside.group.width, found.units)
            found.within[inside.group.name] = inside.left[went]
        yield found
        for candidate in candidates:
            if candidate is cheapest or cheapest.modules & candidate.modules:
                candidate.refresh()


def packed(
    order: Sequence[Removal], cluster: Sequence[PruneGroup], inside: Mapping[str, Directions]
) -> dict[str, Tensor]:
    """An order and the bases of directions inside heads as tensors, to be kept; of `unpacked`."""
    number = {group.name: index for index, group in enumerate(cluster)}
    went = [(at, name, units) for at, removal in enumerate(order) for name, units in removal.within.items()]
    found = {
        "cost": torch.tensor([removal.cost for removal in order], dtype=torch.float64),
        "group": torch.tensor([number[removal.group] for removal in order]),
        "within_at": torch.tensor([at for at, *_ in went], dtype=torch.int64),
        "within_group": torch.tensor([number[name] for _, name, _ in went], dtype=torch.int64),
    }
    within = [units for *_, units in went]
    for name, parts in (("units", [removal.units for removal in order]), ("within", within)):
        found[name] = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
        found[f"{name}_count"] = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    for name, each in inside.items():
        found |= {f"z|{name}": each.z, f"y|{name}": each.y.T}
    return found


def unpacked(
    found: Mapping[str, Tensor], cluster: Sequence[PruneGroup]
) -> tuple[list[Removal], dict[str, tuple[Tensor, Tensor]]]:
    """What `packed` made tensors of: an order, and (Z, Y) by group."""
    blocks, within = (found[name].split(found[f"{name}_count"].tolist()) for name in ("units", "within"))
    costs, groups = found["cost"].tolist(), found["group"].tolist()
    order = [
        Removal(cost, cluster[g].name, units) for cost, g, units in zip(costs, groups, blocks, strict=True)
    ]
    for at, g, units in zip(found["within_at"].tolist(), found["within_group"].tolist(), within, strict=True):
        order[at].within[cluster[g].name] = units
    names = [key.removeprefix("z|") for key in found if key.startswith("z|")]
    return order, {name: (found[f"z|{name}"], found[f"y|{name}"]) for name in names}


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
        for name, units in removal.within.items():
            values[name][units.numpy()] = np.nextafter(level, np.float32(np.inf))
        if at + 1 < len(orders[index]):
            heappush(heads, (orders[index][at + 1].cost, index, at + 1))
    # What no removal was found for goes last.
    return {name: torch.from_numpy(np.nan_to_num(value, nan=10 * level)) for name, value in values.items()}
