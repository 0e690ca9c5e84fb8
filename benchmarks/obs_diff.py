"""OBS-Diff's structured pruning (Zhu et al., ICLR 2026, arXiv 2510.06751), as a baseline.

Layer by layer in packages, in network order: the Hessian H = sum of x x^T over calibration calls; a
unit costs sum ||W_j||^2 / [H^-1]_jj over its columns; the same share of units goes in every layer; W is
updated in closed form; then the next package, which sees what became of the ones before. Dampening 1 %,
as in their code. The paper weighs earlier time steps more, by a falling logarithm whose constants were
not at hand: all weigh alike here (ablation.py: such weights change our own compensation by nothing).
"""

import torch
from torch import Tensor

import ecodiff
from ecodiff.architectures import find_groups, unit_parameters
from ecodiff.learning.calibration import Calibration, Statistics, seen
from ecodiff.pipelines import denoiser_of

DAMPING = 0.01


@torch.no_grad()
def prune(pipe, calibration: Calibration, ratio: float, packages: int = 4):
    """A pruned and compensated variant with about `ratio` of the denoiser's parameters removed."""
    groups = find_groups(denoiser_of(pipe))
    counts = _counts(denoiser_of(pipe), groups, ratio)
    small = ecodiff.variant(pipe, {})
    size = -(-len(groups) // packages)
    for first in range(0, len(groups), size):
        # Anew each time: where two groups share a consumer, columns move when the first is cut.
        now = {group.name: group for group in find_groups(denoiser_of(small))}
        package = [now[group.name] for group in groups[first : first + size]]
        names = [slot.module for group in package for slot in group.consumers]
        statistics = {name: Statistics() for name in names}
        for call in calibration.calls:
            for name, (x, y) in seen(denoiser_of(small), call, names).items():
                statistics[name].add(y, x)
        hessians = {n: _damped(found.xx / found.rows) for n, found in statistics.items()}
        dense = {n: denoiser_of(small).get_submodule(n).weight.float() for n in names}
        keep, columns = {}, {n: torch.ones(weight.shape[1], dtype=torch.bool) for n, weight in dense.items()}
        for group in package:
            kept = keep[group.name] = _chosen(group, dense, hessians, counts[group.name])
            for slot in group.consumers:
                columns[slot.module][slot.index[~kept].flatten()] = False
        weights = {n: _updated(dense[n], hessians[n], columns[n]) for n in dense}
        ecodiff.slice_(denoiser_of(small), keep)
        for name, weight in weights.items():
            module = denoiser_of(small).get_submodule(name)
            module.weight = torch.nn.Parameter(weight.to(module.weight.dtype), False)
    return small


def _counts(denoiser, groups, ratio: float) -> dict[str, int]:
    """Units to remove from each layer: one share for all, such that the size is what was asked."""
    costs = {g.name: unit_parameters(denoiser, g) for g in groups}
    wanted = ratio * sum(p.numel() for p in denoiser.parameters())
    best: dict[str, int] = {}
    for share in torch.linspace(0, 1, 401).tolist():
        counts = {g.name: min(round(share * g.size), g.size - 1) for g in groups}
        for group in groups:
            if group.kind == "ffn":  # widths in multiples of 8, as everybody's here
                counts[group.name] -= counts[group.name] % 8
        removed = sum(costs[name] * count for name, count in counts.items())
        nearest = min((sum(costs[n] * c for n, c in best.items()) - wanted) ** 2, (removed - wanted) ** 2)
        if nearest == (removed - wanted) ** 2:
            best = counts
    return best


def _damped(hessian: Tensor) -> Tensor:
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian))


def _updated(weight: Tensor, hessian: Tensor, columns: Tensor) -> Tensor:
    """W H[:, K] H[K, K]^-1."""
    kept = hessian[columns][:, columns]
    return torch.linalg.solve(kept, (weight @ hessian[:, columns]).T).T


def _chosen(group, weights: dict[str, Tensor], hessians: dict[str, Tensor], count: int) -> Tensor:
    """Units that stay: greedily without the cheapest, heads one at a time, neurons in chunks."""
    keep = torch.ones(group.size, dtype=torch.bool)
    while count > 0:
        error = torch.zeros(int(keep.sum()))
        for slot in group.consumers:
            weight, hessian = weights[slot.module], hessians[slot.module]
            columns = torch.ones(weight.shape[1], dtype=torch.bool)
            columns[slot.index[~keep].flatten()] = False
            updated = _updated(weight, hessian, columns)
            inverse = torch.linalg.inv(hessian[columns][:, columns])
            place = (columns.cumsum(0) - 1)[slot.index[keep]]  # of each unit's columns among those left
            own = inverse[place[:, :, None], place[:, None, :]]
            diagonal = torch.linalg.cholesky(own).diagonal(dim1=1, dim2=2).square()
            error += (updated.square().sum(0)[place] / diagonal).sum(1)
        going = 1 if group.kind == "heads" else min(count, 64)
        keep[keep.nonzero().flatten()[error.argsort()[:going]]] = False
        count -= going
    return keep
