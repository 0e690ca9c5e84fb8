"""What removing a unit costs to second order: the Gauss-Newton diagonal of the objective."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..architectures import find_groups, unit_parameters
from ..pipelines import denoiser_of, stream
from ..pruning.masking import masked
from ..units import PRESET_KINDS, PruneGroup
from .checkpointing import Keep
from .directions import sampled
from .progress import Progress
from .scoring import Values, method
from .trajectory import trajectory


@method(
    "gauss-newton",
    "ecodiff: Gauss-Newton diagonal of the objective",
    cost=4,
    wide=True,
    kinds=(*PRESET_KINDS, "modulation_directions"),
    batches=12,
)
def gauss_newton(
    pipe: DiffusionPipeline,
    calls: Sequence[dict],
    seed: int = 0,
    prompts: Sequence[str] = (),
    on_step: Callable[[], None] | None = None,
    kinds: Sequence[str] = (*PRESET_KINDS, "modulation_directions"),
    kept: Progress | None = None,
) -> Values:
    """Diagonal of the Gauss-Newton matrix of the objective, per parameter that a unit holds.

    For the loss L(m) = ||z_0(m) - z_0(1)||^2 the Hessian at m = 1 is 2 J^T J. With r normal,
    E[(d(r . z_0) / dm_i)^2] = ||J_i||^2: a backward pass through a whole trajectory estimates what
    removing unit i costs. Divided by the unit's parameters, because parameters are what is bought.

    Args:
        calls: arguments of the pipeline, one dict a batch of trajectories (lists of prompts and
            of generators).
        prompts: what directions are found from; none: they are the features themselves.
        on_step: called before every denoiser call; raise in it to stop.
        kinds: of units that may go.
        kept: where what was done is kept.
    """
    groups = [group for group in find_groups(denoiser_of(pipe), kinds) if not group.inside]

    def sample(index: int, call: dict) -> dict[str, Tensor]:
        return gauss_newton_sample(pipe, groups, call, stream("probe", seed, index), on_step=on_step)

    costs, bases = sampled(pipe, groups, list(calls), prompts, seed, sample, kept)
    found = Values({g.name: costs[g.name] / unit_parameters(denoiser_of(pipe), g) for g in groups})
    found.bases = bases
    return found


def gauss_newton_sample(
    pipe: DiffusionPipeline,
    groups: list[PruneGroup],
    call: dict,
    generator: torch.Generator,
    checkpoint: bool | Keep = True,
    on_step=None,
    rows: slice | None = None,
) -> dict[str, Tensor]:
    """One random projection: the squared gradient of r . z_0 with respect to every gate.

    Every latent of a batch has a gate and an r of its own: its squares are a sample each, and their
    mean is returned, in units of the relative error, ||dz_0||^2 / (n var z_0). Experts share gates, as
    a router mixes the rows' tokens: the r are independent, so the square of a sum over rows is a sample
    of the sum of squares. `rows` says which of a larger batch these are, so that each gets the r that it
    would have in it.
    """
    denoiser, count = denoiser_of(pipe), len(call["prompt"])
    shapes = {g.name: (1 if g.routed else count, g.size) for g in groups}
    gates = {n: torch.ones(shape, device=denoiser.device, requires_grad=True) for n, shape in shapes.items()}
    with masked(denoiser, gates), trajectory(pipe, checkpoint, on_step) as run:
        z0 = run(**call).float().flatten(1)
        rows = rows or slice(len(z0))
        r = torch.randn(rows.stop, z0.shape[1], generator=generator)
        r = r[rows].to(z0.device)
        spread = z0.detach().var(1, keepdim=True) * z0.shape[1]
        found = torch.autograd.grad((r * z0 / spread.sqrt()).sum(), list(gates.values()), allow_unused=True)
    pairs = zip(gates.items(), found, strict=True)
    gradients = {n: torch.zeros_like(g) if grad is None else grad.float() for (n, g), grad in pairs}
    return {name: gradient.square().sum(0).cpu() / count for name, gradient in gradients.items()}
