"""Masks applied to a denoiser while a context is open."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..architectures import find_groups
from ..errors import PlanError
from ..machine import device_of
from ..units import ALL_KINDS, PruneGroup
from .ecodiff_sliced_v1 import ScatteredLinear
from .heads import projection, turned


def _factors(denoiser: nn.Module, groups: list[PruneGroup], masks: Mapping[str, Tensor]):
    """One factor a feature that a consumer reads, or gives: (features,) or (rows, features)."""
    factors: dict[tuple[str, str, tuple | None], Tensor] = {}
    device = device_of(denoiser)
    for group in groups:
        mask = masks.get(group.name)
        if mask is None or group.name in getattr(masks, "bases", {}):
            continue
        if mask.ndim not in (1, 2) or mask.shape[-1] != group.size:
            raise PlanError(
                f"The mask of {group.name} has shape {tuple(mask.shape)}; it has {group.size} units."
            )
        for slot in (*group.consumers, *group.norms):
            mask = mask.to(device, torch.promote_types(torch.float32, mask.dtype))
            index = slot.index.to(device)
            spread = mask.repeat_interleave(index.shape[1], dim=-1)
            whole = spread.new_ones(*mask.shape[:-1], slot.features(denoiser))
            factor = whole.index_copy(-1, index.flatten(), spread)
            key = (slot.module, "norm" if slot in group.norms else slot.axis, slot.bare)
            factors[key] = factors.get(key, 1) * factor
    return factors


@contextmanager
def masked(denoiser: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply every unit by its mask while the context is open.

    Gradients flow to masks that require them. The masks are read once, on entry: every time step,
    and every recomputation of one by gradient checkpointing, sees the same values.

    Args:
        masks: a `PrunePlan`, or {group name: (units,) in [0, 1]}; a group not named is left alone.
            A mask of shape (rows, units) is one mask a sample of a batch of `rows`.

    Raises:
        PlanError: a name or a shape does not fit the denoiser.
    """
    groups = find_groups(denoiser, ALL_KINDS)
    unknown = set(masks) - {group.name for group in groups}
    if unknown:
        raise PlanError(
            f"{type(denoiser).__name__} has no group named {sorted(unknown)[0]!r}"
            f"{f' (and {len(unknown) - 1} more)' if len(unknown) > 1 else ''}. "
            "Was the plan made for another model?"
        )
    handles, factors, before = [], _factors(denoiser, groups, masks), factors_of(denoiser)
    _FACTORS[denoiser] = [*before, *factors.values()]
    for (name, axis, bare), factor in factors.items():
        module = denoiser.get_submodule(name)
        if bare:
            handles.append(module.register_forward_pre_hook(partial(_multiply_parameter, factor, *bare)))
            handles.append(module.register_forward_hook(partial(_restore, bare[0]), always_call=True))
        elif axis == "in":
            handles.append(module.register_forward_pre_hook(partial(_multiply_input, factor)))
        else:
            hook = _renormalise if axis == "norm" else _multiply_output
            handles.append(module.register_forward_hook(partial(hook, factor)))
    for group in groups:
        if group.name not in (bases := getattr(masks, "bases", {})):
            continue
        if group.inside:
            within = projection(group, masks)  # type: ignore[arg-type]
            for slot in group.consumers:
                module = denoiser.get_submodule(slot.module)
                if slot.axis == "in":
                    handles.append(module.register_forward_pre_hook(partial(_turn_input, slot.index, within)))
                else:
                    handles.append(module.register_forward_hook(partial(_turn_output, slot.index, within)))
        else:
            onto = partial(_project_input, *bases[group.name])
            names = {slot.module for slot in group.consumers}
            handles += [denoiser.get_submodule(name).register_forward_pre_hook(onto) for name in names]
    try:
        yield
    finally:
        _FACTORS[denoiser] = before
        for handle in handles:
            handle.remove()


_FACTORS: WeakKeyDictionary[nn.Module, list[Tensor]] = WeakKeyDictionary()


def factors_of(denoiser: nn.Module) -> list[Tensor]:
    """What the masks that are open now multiply features by: inputs of every call, in all but name."""
    return _FACTORS.get(denoiser, [])


def _multiply_parameter(factor: Tensor, name: str, dim: int, module: nn.Module, inputs: tuple) -> None:
    """Packed experts read no module's input that could be multiplied; their weights' rows are instead.

    The product hides the parameter, which stays where it was, for the time of one call.
    """
    weight = module.get_parameter(name)
    module.__dict__[name] = _times(weight, factor, dim)


def _restore(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    module.__dict__.pop(name, None)


def _multiply_input(factor: Tensor, module: nn.Module, inputs: tuple) -> tuple:
    features = 1 if isinstance(module, (nn.Conv2d, nn.Conv3d)) else inputs[0].ndim - 1
    return (_times(inputs[0], factor, features), *inputs[1:])


def _project_input(project: Tensor, lift: Tensor, module: nn.Module, inputs: tuple) -> tuple:
    """What is left of an input of which only some directions stay, s to Y Z s."""
    z, y = (matrix.to(inputs[0].device, inputs[0].dtype) for matrix in (project, lift))
    return (inputs[0] @ z.T @ y.T, *inputs[1:])


def _turn_input(index: Tensor, within: Tensor, module: nn.Module, inputs: tuple) -> tuple:
    """What is left of what heads give of which only some directions stay."""
    return (_turned(inputs[0], index, within), *inputs[1:])


def _turn_output(index: Tensor, within: Tensor, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """What is left of keys of which only some directions are compared: q . (Y Z)^T k = (Z q) . (Y^T k)."""
    across = within.unflatten(0, (-1, within.shape[1])).mT.flatten(0, 1)
    return _turned(output, index, across)


def _turned(x: Tensor, index: Tensor, parts: Tensor) -> Tensor:
    """`turned` of features along the last axis."""
    return turned(x.flatten(0, -2).T, index, parts.to(x.device)).T.view(x.shape)


def _multiply_output(factor: Tensor, module: Any, inputs: tuple, output: Tensor) -> Tensor:
    if isinstance(module, ScatteredLinear):
        layer: Any = module
        whole = factor.new_zeros((*factor.shape[:-1], layer.width))
        factor = whole.index_copy(-1, layer.rows, factor)
    return _times(output, factor, output.ndim - 1)


def _renormalise(factor: Tensor, norm: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """The norm with its means over what is kept, sum(m x^2) / sum(m): its own at m = 1.

    A norm that is sliced takes its mean over the features that are left. A mask that is learned
    under any other reading would not be that of the model that is cut from it.
    """
    x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
    factor = _spread(factor, x, x.ndim - 1)
    share = factor / factor.sum(-1, keepdim=True).clamp_min(1e-12)
    if isinstance(norm, nn.LayerNorm):
        x = x - (share * x).sum(-1, keepdim=True)
    eps = torch.finfo(inputs[0].dtype).eps if norm.eps is None else norm.eps
    x = x * ((share * x.square()).sum(-1, keepdim=True) + eps).rsqrt() * norm.weight
    return (x if getattr(norm, "bias", None) is None else x + norm.bias).to(output.dtype)


def _times(x: Tensor, factor: Tensor, features: int) -> Tensor:
    return x * _spread(factor, x, features).to(x.dtype)


def _spread(factor: Tensor, x: Tensor, features: int) -> Tensor:
    """The factor in a shape that can be multiplied by x, along its axis `features`."""
    shape = [1] * x.ndim
    shape[features] = factor.shape[-1]
    if factor.ndim == 2:  # guidance stacks the whole batch again for the empty prompt
        factor = factor.repeat(x.shape[0] // factor.shape[0], 1)
        shape[0] = x.shape[0]
    return factor.view(shape)
