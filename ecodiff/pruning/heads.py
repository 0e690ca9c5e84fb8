"""Directions inside attention heads: an exact rewriting of the dense layers, where a direction is a feature.

A head gives sum a v over tokens, linear in its values v = W_v s, and W_o reads it. With any Z, Y of a head's
width, Y Z = 1, (W_o Y) (Z W_v) changes nothing. Rows of Z W_v, and the columns of W_o Y that read them, are
cut like any others; what is between, which knows heads of one width, sees zeros where they were. In the same
way the scores (W_q s) . (W_k c) are those of Z W_q and Y^T W_k, and rows of both are cut.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import find_groups
from ..units import ALL_KINDS, PruneGroup
from .ecodiff_sliced_v1 import (
    DIRECTIONS,
    FORMAT,
    features_of,
    lay_out,
    see_all_,
    see_through,
    set_directions,
    set_features,
)
from .plan import PrunePlan, packed_rows


def whole(keep: Tensor, parts: Tensor) -> Tensor:
    """(units, width) of what is given for the units that stay, (kept, width); zeros of the others."""
    found = parts.new_zeros(len(keep), parts.shape[1])
    found[keep.to(parts.device)] = parts
    return found


def turned(matrix: Tensor, index: Tensor, parts: Tensor) -> Tensor:
    """A matrix whose rows of a head's features are replaced by those of its directions.

    Args:
        matrix: (features, any).
        index: (units, copies), the rows of each unit.
        parts: (units, width), each direction in the features of its head, a width of units.
    """
    width, index = parts.shape[1], index.to(matrix.device)
    heads = matrix[index].unflatten(0, (-1, width))  # (heads, width, copies, any)
    found = torch.einsum("hud,hdcn->hucn", parts.unflatten(0, (-1, width)).to(matrix), heads)
    return matrix.index_copy(0, index.flatten(), found.flatten(0, 2))


def parts(group: PruneGroup, plan: PrunePlan) -> tuple[Tensor, Tensor]:
    """Z and Y^T of a plan, (units, width) each; zeros of directions that go."""
    keep = plan[group.name]
    if group.name in plan.bases:
        z, y = plan.bases[group.name]
        return whole(keep, z), whole(keep, y.T)
    features = torch.eye(group.width).repeat(group.size // group.width, 1)
    return whole(keep, features[keep]), whole(keep, features[keep])


def projection(group: PruneGroup, plan: PrunePlan) -> Tensor:
    """Y Z of every head, (units, width): what is left of its features if only the plan's directions stay."""
    z, y = (part.unflatten(0, (-1, group.width)) for part in parts(group, plan))
    return (y.mT @ z).flatten(0, 1)


def turn_(denoiser: nn.Module, plan: PrunePlan) -> None:
    """Rewrite the layers around the heads in the plan's bases, in place; directions that go are zeros."""
    for group in find_groups(denoiser, ALL_KINDS):
        if not group.inside or group.name not in plan.bases:
            continue
        z, y = parts(group, plan)
        for slot in (*group.producers, *group.consumers):
            linear: Any = denoiser.get_submodule(slot.module)
            part = z if slot in group.producers else y
            if slot.axis == "in":
                _set(linear, "weight", turned(_exact(linear.weight).T, slot.index, part).T)
                continue
            _set(linear, "weight", turned(_exact(linear.weight), slot.index, part))
            if linear.bias is not None:
                _set(linear, "bias", turned(_exact(linear.bias)[:, None], slot.index, part)[:, 0])


def _exact(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))


def _set(linear: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(linear, name)
    new = nn.Parameter(value.to(old.dtype).contiguous(), requires_grad=old.requires_grad)
    setattr(linear, name, new)


def left(group: PruneGroup, plan: Mapping[str, Tensor]) -> Tensor:
    """Which directions stay, (units,) bool: those that a plan keeps of heads that it keeps."""
    keep = plan.get(group.name, torch.ones(group.size, dtype=torch.bool))
    heads = plan.get(group.inside)
    return keep if heads is None else keep & heads.repeat_interleave(group.width)


def narrow_(
    denoiser: nn.Module,
    groups: Iterable[PruneGroup],
    plan: PrunePlan,
    kept: Mapping[tuple[str, str], Tensor],
    outer: Mapping[tuple[str, str], Tensor],
) -> None:
    """Let what is around the heads see layers that were cut inside them as wide as the heads that are left.

    Args:
        groups: those of `denoiser` before it was cut.
        kept: `kept_features` of all of the plan; outer: of all but directions inside heads.
    """
    groups = [group for group in groups if group.inside]
    places = {
        (slot.module, slot.axis): _owner(group, slot.module) for group in groups for slot in group.slots
    }
    for path, module in denoiser.named_modules():
        for child, (axis, *_) in getattr(module, "partly", {}).items():
            places[f"{path}.{child}", axis] = path, child
    seen: dict[str, torch.device | str] = {}
    for place, (owner, child) in places.items():
        if place not in kept:
            continue
        module, both, axis = denoiser.get_submodule(owner), kept[place], place[1]
        others = outer.get(place, torch.ones_like(both))
        before, width = features_of(module, child) if child in getattr(module, "partly", {}) else (None, 0)
        if before is None:
            before, width = torch.arange(len(both)), len(both)
        stays = torch.ones(width, dtype=torch.bool)
        stays[before[~others]] = False
        index = (stays.cumsum(0) - 1)[before[both]]
        if len(index) < int(stays.sum()):
            see_through(module, child, axis, index, int(stays.sum()))
            seen[owner] = _real(denoiser, place[0])
    for owner, device in seen.items():
        lay_out(denoiser.get_submodule(owner), device)
    for group in groups:
        now = left(group, plan)
        if group.name in plan and not plan[group.name].all() and now.any():
            attention: Any = denoiser.get_submodule(group.inside)
            like: Any = denoiser.get_submodule(group.producers[0].module).weight
            z, y = (part[now].to(like.device, like.dtype) for part in parts(group, plan))
            set_directions(attention, group.name.rpartition(".")[2], z, y)


def _owner(group: PruneGroup, module: str) -> tuple[str, str]:
    """The module whose code calls `module`, and the name that it has there."""
    if module.startswith(f"{group.inside}."):
        return group.inside, module.removeprefix(f"{group.inside}.")
    owner, _, child = module.rpartition(".")  # what reads the heads is beside the attention
    return owner, child


def _real(denoiser: nn.Module, module: str) -> torch.device | str:
    """Where indices belong: they are no data but shape, and exist for a model on the meta device too."""
    layer: Any = denoiser.get_submodule(module)
    return "cpu" if layer.weight.device.type == "meta" else layer.weight.device


def bases_of(denoiser: nn.Module, plan: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(Z, Y) by group of directions, of a denoiser that was cut by `plan`, of heads that are left."""
    found = {}
    for path, module in denoiser.named_modules():
        for name in DIRECTIONS:
            project: Any = getattr(module, f"{name}_project", None)
            if project is None or project.device.type == "meta":
                continue
            keep, heads = plan[f"{path}.{name}"], plan.get(path)
            width = project.shape[1]
            alive = keep if heads is None else keep & heads.repeat_interleave(width)
            z, y = (torch.eye(width).repeat(len(keep) // width, 1) for _ in range(2))
            z[alive], y[alive] = project.float().cpu(), getattr(module, f"{name}_lift").float().cpu()
            found[f"{path}.{name}"] = z[keep], y[keep].T.contiguous()
    return found


def described(denoiser: nn.Module) -> dict[str, Any]:
    """What `ecodiff_sliced_v1.apply` is told of layers that were cut inside their heads."""
    partly: dict[str, dict] = {}
    directions: dict[str, dict[str, list[int]]] = {}
    for path, module in denoiser.named_modules():
        for child, (axis, *_) in getattr(module, "partly", {}).items():
            rows = packed_rows(*features_of(module, child))
            partly.setdefault(path, {})[child] = [axis, rows]
        for name, entry in DIRECTIONS.items():
            if hasattr(module, f"{name}_project"):
                directions.setdefault(entry, {})[path] = list(getattr(module, f"{name}_project").shape)
    version = FORMAT if DIRECTIONS["queries"] in directions else 3
    return {"format": version, "partly": partly, **directions} if partly else {}


def fill_heads_(denoiser: nn.Module) -> nn.Module:
    """Undo, in place, that layers are cut inside their heads: zeros where directions are gone. Returns it.

    For formats that know heads of one width only. New parameters are made, as by slicing.
    """
    for _, module in list(denoiser.named_modules()):
        for child, (axis, width, _) in getattr(module, "partly", {}).items():
            index, linear = features_of(module, child)[0], module.get_submodule(child)
            for name, old in list(linear.named_parameters(recurse=False)):
                if name == "bias" and axis == "in":
                    continue
                shape = list(old.shape)
                shape[axis == "in"] = width
                full = old.detach().new_zeros(shape)
                full = full.index_copy(int(axis == "in"), index.to(old.device), old.detach())
                setattr(linear, name, nn.Parameter(full, requires_grad=old.requires_grad))
            set_features(linear)
        if hasattr(module, "partly"):
            see_all_(module)
    return denoiser
