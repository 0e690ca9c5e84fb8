"""In which order a ranking's units go, in blocks that leave widths that hardware likes."""

import hashlib
from collections.abc import Iterator, Mapping
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError
from ..units import KINDS
from .plan import PrunePlan

WIDE = 64  # what wide layers' remaining widths are multiples of
FEWEST = 4  # a quarter of a layer's directions inside heads goes, or none: gathering what is left takes time


def kept(scores: Any, costs: Mapping[str, float], target: float, align: bool | int) -> dict[str, Tensor]:
    """Which units stay, bool (units,) a group, once `target` of `costs` is gone, the cheapest worth first."""
    order = [move for name in scores.values for move in moves(scores, name, costs, align)]
    order.sort(key=lambda move: move[0])
    keep = {name: torch.ones(len(v), dtype=torch.bool) for name, v in scores.values.items()}
    holds: dict[str, list[str]] = {}
    for name, heads in scores.inside.items():
        holds.setdefault(heads, []).append(name)
    removed = 0.0
    for _, name, units in order:
        units = units[~within(scores, keep, name)[units]]  # what went with its head is gone
        cost = costs[name] * len(units) - (scores.setup(name, costs) if keep[name].all() else 0)
        for directions in holds.get(name, ()):
            gone = ~keep[directions].view(len(keep[name]), -1)[units]
            cost -= costs[directions] * int(gone.sum())
        if removed + cost / 2 > target:  # stop where the size is nearest to what was asked
            break
        keep[name][units] = False
        removed += cost
    return keep


def removable(scores: Any, costs: Mapping[str, float]) -> float:
    """What goes if all units go that may, in the unit of `costs`; what is inside heads goes with them."""
    most = (
        costs[name] * (len(values) - scores.floor(name)) - scores.setup(name, costs)
        for name, values in scores.values.items()
        if name not in scores.inside
    )
    return sum(max(0, cost) for cost in most)


def within(scores: Any, keep: Mapping[str, Tensor], name: str) -> Tensor:
    """Which units of a group are gone with the units of another that hold them, bool (units,)."""
    gone = torch.zeros(len(scores.values[name]), dtype=torch.bool)
    if name in scores.inside and (heads := keep.get(scores.inside[name])) is not None:
        gone = (~heads).repeat_interleave(len(gone) // len(heads))
    return gone


def free(scores: Any, name: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values and numbers of the units of a group that may go, rising.

    Not those that the floor keeps; of directions, one stays in every head: it goes when the head goes.
    """
    ranked, order = values.sort(stable=True)
    if name in scores.inside:
        heads = len(scores.values[scores.inside[name]])
        may = torch.ones(len(values), dtype=torch.bool)
        may[values.view(heads, -1).argmax(1) + torch.arange(heads) * (len(values) // heads)] = False
        ranked, order = ranked[may[order]], order[may[order]]
    left = min(len(order), len(values) - scores.floor(name))
    return ranked[:left], order[:left]


def kept_by_kind(scores: Any, shares: Mapping[str, float]) -> dict[str, Tensor]:
    """Which units stay if of each kind this fraction of its units goes, the lowest values first."""
    keep = {name: torch.ones(len(v), dtype=torch.bool) for name, v in scores.values.items()}
    for kind, share in shares.items():
        names = [name for name in keep if scores.kinds[name] == kind]
        total = sum(len(keep[name]) for name in names)
        units: list[tuple[float, str, int]] = []
        for name in names:
            ranked, order = free(scores, name, scores.values[name])
            units += zip(ranked.tolist(), [name] * len(order), order.tolist(), strict=True)
        count = round(share * total)
        if not names or not 0 <= share <= 1 or count > len(units):
            most = f"at most {len(units) / total:.0%} of its units" if names else "it is not ranked here"
            raise BudgetError(f"{share:.1%} of {kind!r} cannot be removed: {most}.")
        for _, name, unit in sorted(units, key=lambda entry: entry[0])[:count]:
            keep[name][unit] = False
    return keep


def planned(scores: Any, keep: dict[str, Tensor]) -> PrunePlan:
    """The plan that keeps those units, with what it leaves."""
    found = bases(scores, keep)
    plan = PrunePlan(keep, scores.metadata, found)
    if found:
        data = b"".join(z.numpy().tobytes() for z, _ in found.values())
        plan.metadata["basis"] = hashlib.sha256(data).hexdigest()
    pruned = scores.total - scores.removed(plan)
    plan.metadata |= {"ratio": round(1 - pruned / scores.total, 6)}
    plan.metadata |= {"params_dense": scores.total, "params_pruned": pruned}
    if scores.macs:
        plan.metadata |= {"macs_dense": scores.total_macs}
        plan.metadata |= {"macs_pruned": scores.total_macs - scores.removed(plan, scores.macs)}
    return plan


def bases(scores: Any, keep: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(Z, Y) of what is kept of the directions of groups that lose some."""
    cut = [name for name in sorted(scores.bases) if name in keep and not keep[name].all()]
    return {n: (scores.bases[n][0][keep[n]], scores.bases[n][1][:, keep[n]].contiguous()) for n in cut}


def moves(
    scores: Any, name: str, costs: Mapping[str, float], align: bool | int
) -> Iterator[tuple[float, str, Tensor]]:
    """Units of a group in the order in which they go: (worth per cost, name, their numbers).

    Blocks are runs of the group's own ranking, so their mean worth rises too; the first one
    takes what does not fill a block, or a quarter of the directions inside heads.
    """
    values = scores.values[name] * (scores.costs[name] / (costs[name] or 1))
    setup = scores.setup(name, costs)
    ranked, order = free(scores, name, values)
    kind = KINDS[scores.kinds[name]]
    width = _block(len(values), align) if align and kind.aligned else 1
    left = len(order)
    first = len(values) % width
    if setup and costs[name]:  # the first block has to pay for what it makes necessary
        first += width * max(1, ceil((setup / costs[name] - first) / width))
        if first * costs[name] <= setup or first > left:
            return
    elif name in scores.inside:
        first = ceil(len(values) / FEWEST)
    first = min(first, left)
    blocks, last = divmod(left - first, width)  # the last one leaves what the floor keeps
    sizes = [first] * (first > 0) + [width] * blocks + [last] * (last > 0)
    before = -inf  # none goes before that which pays
    for number, (ranks, members) in enumerate(zip(ranked.split(sizes), order.split(sizes), strict=True)):
        price = len(members) * costs[name]
        worth = float(ranks.mean()) * (price / (price - setup) if setup and not number else 1)
        before = max(before, worth)
        yield before, name, members


def _block(units: int, align: bool | int) -> int:
    """Units that go at a time from a group of so many."""
    wide = WIDE if align is True else align
    return wide if units >= max(1024, wide) else min(8, units)


def fastest(scores: Any, latency_ms: float, measured, align: bool | int) -> PrunePlan:
    """The largest plan that `measured` says takes no longer, by bisection over the ratio."""
    if measured is None:
        raise BudgetError("A budget in milliseconds needs measured=, a function that times a plan.")
    low, high = 0.0, scores.ceiling
    best = scores.plan(ratio=high, align=align)
    if measured(best) > latency_ms:
        raise BudgetError(f"Even the smallest plan takes longer than {latency_ms} ms on this machine.")
    for _ in range(8):
        middle = scores.plan(ratio=(low + high) / 2, align=align)
        if measured(middle) > latency_ms:
            low = (low + high) / 2
        else:
            best, high = middle, (low + high) / 2
    return best
