"""What remains takes over from what was removed: a closed-form update of the consumers' weights.

Dense consumers compute y = W x + b. Once units are gone the input is x', with fewer features. The
weights that reproduce y best from it, in the least squares sense over calibration data, pulled
towards the weights W_S that slicing left, are

    W' = W_S + (C - W_S A) (A + e I)^-1,    A = cov(x', x'),  C = cov(y, x'),
    b' = mean(y) - W' mean(x').

With x' = x_S, e = 0 and no bias this is W S[:, S] (S[S, S])^-1 of Optimal Brain Surgeon for whole
columns, as in OBS-Diff (arXiv 2510.06751) and SlimGPT. No gradients, no images.

x' are the features that stay, as the dense model has them: one pass over the data serves every layer
and every size. Those of the pruned model itself, in network order, were tried and are no better
(docs/method.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups
from ..config import CompensateConfig
from ..machine import device_of
from ..pipelines import denoiser_of
from ..pruning.heads import parts
from ..pruning.plan import PrunePlan
from ..pruning.slicing import kept_features, plan_of
from ..units import ALL_KINDS
from .calibration import Calibration, Statistics
from .conditioning import encoder_calls
from .encodings import text_encoders


def solve(statistics: Statistics, weight: Tensor, bias: Tensor | None, damping: float):
    """The equation above: updated weight (out, kept) and bias (out,) or None."""
    a, c = statistics.covariances(centred=bias is not None)
    damp = damping * a.diagonal().mean().clamp_min(1e-12)
    a = a + damp * torch.eye(len(a), dtype=a.dtype, device=a.device)
    weight = weight + torch.linalg.solve(a, (c + damp * weight - weight @ a).T).T
    if bias is not None:
        bias = (statistics.y - weight @ statistics.x) / statistics.rows
    return weight, bias


@torch.no_grad()
def compensate_(
    small: DiffusionPipeline,
    pipe: DiffusionPipeline,
    prompts: Sequence[str] = (),
    config: CompensateConfig | None = None,
    calibration: Calibration | None = None,
) -> dict[str, bool]:
    """Update the weights that slicing left, in place, so that each layer gives what it gave before.

    Args:
        small: a variant of `pipe`, or a pruned pipeline that was loaded; only layers that were cut
            are changed, and they get new parameters: what is shared with `pipe` is not touched.
        pipe: the dense pipeline.
        prompts: calibration prompts; those of `config.heldout` trajectories only check.
        calibration: what was gathered before, instead of prompts and config.

    Returns:
        {consumer: updated}, of text encoders by "text_encoder.layer". A layer that would be worse on the
        held-out trajectories keeps its weights.

    Raises:
        BudgetError: no trajectories are left to learn from, or there are no prompts.

    Example:
        >>> small = ecodiff.variant(pipe, scores.plan(ratio=0.3))
        >>> ecodiff.compensate_(small, pipe, prompts)
    """
    calibration = calibration or Calibration(pipe, prompts, config or CompensateConfig())
    updated = repair_(denoiser_of(small), calibration)
    cut = [name for name in text_encoders(pipe) if plan_of(getattr(small, name))]
    if cut and not calibration.text_encoders:
        calls = encoder_calls(pipe, calibration.prompts, calibration.config)
        calibration.text_encoders = {
            name: Calibration.of_calls(getattr(pipe, name), made, calibration.config)
            for name, made in calls.items()
        }
    for name in cut:
        found = repair_(getattr(small, name), calibration.text_encoders[name])
        updated |= {f"{name}.{layer}": better for layer, better in found.items()}
    return updated


@torch.no_grad()
def repair_(pruned: nn.Module, calibration: Calibration) -> dict[str, bool]:
    """Update the layers of one component, of which the calibration has the dense one; {layer: updated}."""
    dense, plan = calibration.dense, plan_of(pruned) or PrunePlan({})
    kept, turns = _kept_features(dense, plan), _turns(dense, plan)
    updated = {}
    for name, learned, check in calibration.statistics(list(kept)):
        for turn in turns.get(name, ()):
            learned, check = learned.turned(*turn), check.turned(*turn)
        learned, check = learned.of(kept[name]), check.of(kept[name])
        updated[name] = _update(pruned.get_submodule(name), learned, check, calibration.config.damping)
    return updated


def _kept_features(dense: nn.Module, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Input features that stay, of every consumer that loses some, in network order."""
    kept = {name: rows for (name, axis), rows in kept_features(dense, plan).items() if axis == "in"}
    modules, found = dict(dense.named_modules()), {}
    for name, features in kept.items():  # packed experts and convolutions over time stay as they are
        if isinstance(modules[name], (nn.Linear, nn.Conv2d)) and not features.all():
            weight = modules[name].weight
            # A convolution reads each channel at every place of its kernel.
            found[name] = features.repeat_interleave(weight[0, 0].numel()).to(device_of(dense))
    return found


def _turns(dense: nn.Module, plan: PrunePlan) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By consumer, where and in which bases of the heads it was cut: (index, Z)."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for group in find_groups(dense, ALL_KINDS):
        if group.inside and group.name in plan.bases:
            for slot in (slot for slot in group.consumers if slot.axis == "in"):
                z = parts(group, plan)[0].to(device_of(dense))
                found.setdefault(slot.module, []).append((slot.index, z))
    return found


def _update(module: Any, learned: Statistics, check: Statistics, damping: float) -> bool:
    """Solve for one layer; True if that is better on the held-out rows, and done."""
    if not learned.rows or not check.rows:
        return False
    device, old = learned.x.device, module.weight  # a layer's weights may wait elsewhere
    weight = old.to(device).float().flatten(1)
    bias = None if module.bias is None else module.bias.to(device).float()
    found = solve(learned, weight, bias, damping)
    if not check.error(*found) < check.error(weight, bias):
        return False
    module.weight = nn.Parameter(found[0].view_as(old).to(old.device, old.dtype), False)
    if bias is not None:
        module.bias = nn.Parameter(found[1].to(module.bias.device, module.bias.dtype), False)
    return True
