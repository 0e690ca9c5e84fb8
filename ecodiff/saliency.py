"""Scores that need no learning: baselines, and the Gauss-Newton warm start.

Every function returns {group name: float32 (group.size,)}, higher is more important, comparable
across groups; `Scores.of(denoiser, values)` makes a ranking of it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .gates import masked
from .groups import PruneGroup, denoiser_of, find_groups, unit_parameters
from .trajectory import trajectory


def random(denoiser: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Uniform noise: the floor that every method has to beat."""
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator) for g in find_groups(denoiser)}


def magnitude(denoiser: nn.Module) -> dict[str, Tensor]:
    """L2 norm of all weights of a unit, relative to the mean of its layer."""
    values = {}
    for group in find_groups(denoiser):
        squares = torch.zeros(group.size)
        for slot in group.slots:
            weight = denoiser.get_submodule(slot.module).weight.detach().float().cpu()
            per_feature = weight.square().sum(0 if slot.axis == "in" else 1)
            squares += per_feature[slot.index].sum(1)
        values[group.name] = _relative(squares.sqrt())
    return values


def wanda(pipe, calls: Iterable[dict]) -> dict[str, Tensor]:
    """Weight times activation, after Wanda (Sun et al. 2023, arXiv 2306.11695), per unit.

    |W_ij| ||x_j|| summed over a unit's consumer columns, x gathered over whole trajectories,
    relative to the mean of its layer.

    Args:
        calls: arguments of the pipeline, one dict a trajectory.
    """
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser)
    squares: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(module, inputs):
            x = inputs[0].detach().float().flatten(0, -2).square().sum(0).cpu()
            squares[name] = squares.get(name, 0) + x

        return hook

    names = {slot.module for group in groups for slot in group.consumers}
    handles = [denoiser.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    try:
        with trajectory(pipe, checkpoint=False) as run, torch.no_grad():
            for call in calls:
                run(**call)
    finally:
        for handle in handles:
            handle.remove()
    values = {}
    for group in groups:
        unit = torch.zeros(group.size)
        for slot in group.consumers:
            weight = denoiser.get_submodule(slot.module).weight.detach().float().cpu()
            unit += (weight.abs().sum(0) * squares[slot.module].sqrt())[slot.index].sum(1)
        values[group.name] = _relative(unit)
    return values


def gauss_newton(pipe, calls: Iterable[dict], seed: int = 0) -> dict[str, Tensor]:
    """Diagonal of the Gauss-Newton matrix of the objective, per parameter that a unit holds.

    For the loss L(m) = ||z_0(m) - z_0(1)||^2 the Hessian at m = 1 is 2 J^T J. With r normal,
    E[(d(r . z_0) / dm_i)^2] = ||J_i||^2: a backward pass through a whole trajectory estimates what
    removing unit i costs. Divided by the unit's parameters, because parameters are what is bought.

    Args:
        calls: arguments of the pipeline, one dict a trajectory (or a batch of them).
    """
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser)
    totals = {group.name: torch.zeros(group.size) for group in groups}
    for index, call in enumerate(calls):
        squares = gauss_newton_sample(pipe, groups, call, seed + index)
        for name, square in squares.items():
            totals[name] += square
    return {g.name: totals[g.name] / unit_parameters(denoiser, g) for g in groups}


def gauss_newton_sample(
    pipe, groups: list[PruneGroup], call: dict, seed: int, checkpoint: bool = True, on_step=None
) -> dict[str, Tensor]:
    """One random projection: the squared gradient of r . z_0 with respect to every gate.

    r is drawn per latent, so over a batch of trajectories the squares add up in expectation. It is
    scaled so that the result is in units of the relative error, ||dz_0||^2 / (n var z_0).
    """
    device = denoiser_of(pipe).device
    gates = {g.name: torch.ones(g.size, device=device, requires_grad=True) for g in groups}
    with masked(denoiser_of(pipe), gates), trajectory(pipe, checkpoint, on_step) as run:
        z0 = run(**call).float()
        generator = torch.Generator().manual_seed(seed)
        r = torch.randn(z0.shape, generator=generator).to(device)
        projected = (r * z0).sum() / (z0.detach().var() * z0.numel()).sqrt()
        gradients = torch.autograd.grad(projected, list(gates.values()), allow_unused=True)
    pairs = zip(groups, gradients, strict=True)
    return {g.name: torch.zeros(g.size) if grad is None else grad.square().float().cpu() for g, grad in pairs}


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
