"""Directions of what a model's AdaLN layers read: a basis in which dropping one costs as little as it can.

All of a model's AdaLN Linears read one vector, s = silu(embedding of time, guidance and pooled text). With
C = E[s s^T] over prompts and time steps, M = sum over those Linears of E[h h^T], h the gradient of a random
projection of z_0 with respect to the s that the Linear reads (summed over the steps of a trajectory: the
Gauss-Newton metric of the objective), and

    U S^2 U^T = M^1/2 C M^1/2,    Z = U^T M^1/2,    Y = M^-1/2 U,

Y Z = 1, so W s = (W Y) (Z s) changes nothing; the features of Z s are uncorrelated, so W Y without some of
its columns is already the least squares repair; and dropping feature j costs S_j^2. (Of all projections of
a rank, the one that loses least in the metric M: a weighted PCA, as in SliceGPT and ASVD for other layers.)

C needs many prompts, or the pooled text of new ones lies outside what it has seen. But only the text
encoder and the embeddings before the first block run for it.
"""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..pipelines import EnoughError, denoiser_calls, denoiser_of, moved, prompt_rows
from ..units import PruneGroup

DAMPING = 1e-6  # of M, as a fraction of its mean diagonal: what nothing depends on
BATCH = 8  # prompts at a time


class Gradients:
    """While it is open, sums up M of what the consumers of a group read."""

    def __init__(self, denoiser: nn.Module, group: PruneGroup):
        self.layers = [denoiser.get_submodule(slot.module) for slot in group.consumers]
        self.metric = torch.zeros(group.size, group.size)

    def __enter__(self) -> "Gradients":
        self.handles = [layer.register_forward_hook(self._see) for layer in self.layers]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        if given[0].requires_grad:  # it does once gates multiply it
            given[0].register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        rows = gradient.detach().float().flatten(0, -2)
        self.metric += (rows.T @ rows).to(self.metric.device)


@torch.no_grad()
def second_moment(
    pipe: DiffusionPipeline, group: PruneGroup, prompts: Sequence[str], call: dict, seed: int
) -> Tensor:
    """C, float32 (features, features), over all prompts at all time steps of `call`.

    Args:
        call: the pipeline's arguments; its prompts and generators are replaced.
    """
    denoiser, total, rows = denoiser_of(pipe), torch.zeros(group.size, group.size), 0
    times = [kwargs.get("timestep") for _, kwargs in denoiser_calls(pipe, call)]
    options = {name: value for name, value in call.items() if name not in ("prompt", "generator")}
    if isinstance(options.get("negative_prompt"), list):
        options["negative_prompt"] = options["negative_prompt"][0]
    for first in range(0, len(prompts), BATCH):
        part = range(first, min(first + BATCH, len(prompts)))
        args, kwargs = denoiser_calls(pipe, prompt_rows(prompts, part, seed, options), limit=1)[0]
        for time in times:
            if time is not None:
                own = kwargs["timestep"]
                kwargs["timestep"] = time.flatten()[0].expand(own.shape).to(own.dtype)
            s = _read(denoiser, group, *moved((args, kwargs), denoiser.device))
            total += (s.T @ s).cpu()
            rows += len(s)
            if time is None:
                break
    return total / max(1, rows)


def _read(denoiser: nn.Module, group: PruneGroup, args: tuple, kwargs: dict) -> Tensor:
    """What the first of the group's consumers reads in a call, (rows, features); nothing behind it runs."""
    found: list[Tensor] = []

    def keep(module, given):
        found.append(given[0].float().flatten(0, -2))
        raise EnoughError

    layers = [denoiser.get_submodule(slot.module) for slot in group.consumers]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        denoiser(*args, **kwargs)
    except EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0]


def basis(moment: Tensor, metric: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Z, Y, each (features, features), and what dropping each direction costs, (features,).

    Args:
        moment, metric: C and M, (features, features).
    """
    features = len(metric)
    damped = metric.double() + DAMPING * metric.diagonal().mean().double() * torch.eye(features)
    values, vectors = torch.linalg.eigh(damped)
    root = values.clamp_min(values.max() * 1e-12).sqrt()
    half, inverse = vectors * root @ vectors.T, vectors / root @ vectors.T
    costs, turned = torch.linalg.eigh(half @ moment.double() @ half)
    z, y = turned.T @ half, inverse @ turned
    return z.float(), y.float(), costs.clamp_min(0).float()
