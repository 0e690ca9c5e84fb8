"""Directions of what AdaLN layers read: one projection that all of them share, made when some go."""

from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import find_groups
from ..units import ALL_KINDS
from .ecodiff_sliced_v1 import project
from .plan import PrunePlan


def project_directions_(denoiser: nn.Module, plan: PrunePlan) -> set[str]:
    """Project what consumers of directions read onto those that `plan` keeps; paths of those consumers.

    With Z (kept, features) and Y (features, kept) of the plan, W becomes W Y and reads Z s. Of a denoiser
    that has a projection already they are of its directions, and are multiplied into it.
    """
    changed: set[str] = set()
    for group in find_groups(denoiser, ALL_KINDS):
        if not group.activations or group.name not in plan or plan[group.name].all():
            continue
        z, y = plan.basis(group.name)
        like: Any = denoiser.get_submodule(group.consumers[0].module).weight
        before: Any = getattr(denoiser, group.name, None)
        if before is None:
            project(denoiser, list(group.activations), group.size, len(z))
        basis: Any = getattr(denoiser, group.name)
        basis.to(device=like.device, dtype=like.dtype)
        exact = torch.promote_types(like.dtype, torch.float32)
        z, y = z.to(like.device, exact), y.to(like.device, exact)
        for slot in group.consumers:
            linear: Any = denoiser.get_submodule(slot.module)
            _set_weight(linear, linear.weight.to(exact) @ y)
        lift = y if before is None else before.lift.to(exact) @ y
        _set_weight(basis, z if before is None else z @ before.weight.to(exact))
        basis.lift = lift.to(like.dtype)
        basis.out_features = len(z)
        changed |= {slot.module for slot in group.consumers}
    return changed


def _set_weight(linear: Any, weight: Tensor) -> None:
    old = linear.weight
    linear.weight = nn.Parameter(weight.detach().to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    linear.in_features = weight.shape[1]
