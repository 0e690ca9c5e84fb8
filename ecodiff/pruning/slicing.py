"""Physical pruning: index selection on the Linears that a plan's units run through."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import catalog
from ..architectures import find_groups
from ..checks import check_calls, check_layers
from ..errors import PlanError, UnsupportedModelError
from ..pipelines import denoiser_name, denoiser_of
from ..units import ALL_KINDS, BASIS, PruneGroup
from .ecodiff_sliced_v1 import (
    ScatteredLinear,
    fit_processor,
    gather_rope,
    scatter,
    set_features,
    share_bias,
    sliced_class,
    sliced_encoder_class,
)
from .heads import bases_of, described, narrow_, turn_
from .modulation import project_directions_
from .plan import PrunePlan, packed_rows


def slice_(denoiser: nn.Module, plan: PrunePlan | Mapping[str, Tensor]) -> nn.Module:
    """Remove from `denoiser`, in place, every unit that `plan` does not keep. Returns it.

    Exactly the model with those units masked to zero, down to none left in a layer (its output is
    then its bias). New, smaller parameters are made; old ones are left as they are, so a model
    that shares them is not touched. Works on any device, "meta" included.

    A diffusers model also becomes its `Sliced...` class, whose config describes the cut: from then
    on its own `save_pretrained` and `from_pretrained` work.

    Raises:
        PlanError: the plan names a group that the denoiser does not have, or of another size.

    Example:
        >>> ecodiff.slice_(pipe.unet, scores.plan(ratio=0.2))
    """
    plan = plan if isinstance(plan, PrunePlan) else PrunePlan(plan)
    check(plan, denoiser)
    _check_weights(denoiser)
    projected = project_directions_(denoiser, plan)
    turn_(denoiser, plan)
    every = find_groups(denoiser, ALL_KINDS)
    groups = [group for group in every if group.name in plan]
    kept = kept_features(denoiser, plan)
    outer = kept_features(denoiser, {group.name: plan[group.name] for group in groups if not group.inside})
    bare: dict[tuple[str, str], tuple[str, int] | None] = {
        (slot.module, slot.axis): slot.bare for group in groups for slot in group.slots if slot.bare
    }
    for (module, axis), rows in kept.items():
        if not rows.all():
            _cut(denoiser.get_submodule(module), axis, rows, bare.get((module, axis)))
    for name in {slot.module for group in groups for slot in group.slots if slot.scattered}:
        _scatter(denoiser.get_submodule(name), kept[name, "out"])
    for group in groups:
        _set_attributes(denoiser, group, plan[group.name])
    narrow_(denoiser, every, plan, kept, outer)
    if isinstance(denoiser, (ModelMixin, PreTrainedModel)):
        cut = {module for (module, _), rows in kept.items() if not rows.all()}
        _describe(denoiser, plan, groups, cut | projected)
    return denoiser


def _check_weights(denoiser: nn.Module) -> None:
    if any(parameter.dtype.itemsize == 1 for parameter in denoiser.parameters()):
        raise UnsupportedModelError("This denoiser was rounded to rank its units. Open and cut the full one.")


def check(plan: PrunePlan, denoiser: nn.Module) -> None:
    """Raise PlanError unless every group of `plan` is one of `denoiser`'s, with the same units."""
    groups = {group.name: group for group in find_groups(denoiser, ALL_KINDS)}
    model = plan.metadata.get("model")
    for name, keep in plan.items():
        if name not in groups or groups[name].size != len(keep):
            what = f"{groups[name].size} units" if name in groups else "no such group"
            raise PlanError(
                f"This plan does not fit the model: it has {len(keep)} units in {name}, "
                f"and the {type(denoiser).__name__} has {what} there. Use the model that it "
                f"was made for{f' ({model}, as it was then)' if model else ''}."
            )
        if int(keep.sum()) < groups[name].floor:
            raise PlanError(f"{name} must keep at least {groups[name].floor} of its units.")


def kept_features(denoiser: nn.Module, plan: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Which input or output features stay, bool (features,), of every module that a plan's units run
    through: {(module, "in" or "out"): ...}, in network order. All groups of a module together.

    Not of directions: which of them stay is no selection of features (`project_directions_`)."""
    kept: dict[tuple[str, str], Tensor] = {}
    for group in find_groups(denoiser, ALL_KINDS):
        if group.activations:
            continue
        for slot in group.slots if group.name in plan else ():
            whole = torch.ones(slot.features(denoiser), dtype=torch.bool)
            rows = kept.setdefault((slot.module, slot.axis), whole)
            rows[slot.index[~plan[group.name]].flatten()] = False
    return kept


def _cut(module: nn.Module, axis: str, rows: Tensor, bare: tuple[str, int] | None) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if (name == "bias" and axis == "in") or (bare and name != bare[0]):
            continue
        index = rows.nonzero().flatten().to(parameter.device)
        cut = parameter.detach().index_select(bare[1] if bare else int(axis == "in"), index)
        setattr(module, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))
    set_features(module)


def _scatter(linear: Any, rows: Tensor) -> None:
    """Let a Linear that lost rows give zeros in their place; `rows` are those it had before."""
    before = getattr(linear, "rows", torch.arange(len(rows)))
    if not rows.all():
        device = linear.weight.device
        kept = before.cpu()[rows].to("cpu" if device.type == "meta" else device)  # not data but shape
        scatter(linear, kept, getattr(linear, "width", len(rows)))


def _set_attributes(denoiser: nn.Module, group: PruneGroup, keep: Tensor) -> None:
    for attribute in group.attributes:
        module = denoiser.get_submodule(attribute.module)
        setattr(module, attribute.name, int(keep.sum()) * attribute.per_unit)
    if group.kind != "heads" or keep.all():
        return
    attention: Any = denoiser.get_submodule(group.name)
    fit_processor(attention)
    if group.rope_by_head:
        before = getattr(attention, "rope_heads", torch.arange(len(keep)))
        heads = before.cpu()[keep].to(attention.to_q.weight.device)
        gather_rope(attention, heads, getattr(attention, "rope_count", len(keep)))
    if group.bias_by_head:
        all_of_them = getattr(attention, "bias_heads", range(len(keep)))
        heads = [head for head, stays in zip(all_of_them, keep.tolist(), strict=True) if stays]
        share_bias(attention, heads, getattr(attention, "bias_count", len(keep)))


def _describe(denoiser: Any, plan: PrunePlan, groups: list[PruneGroup], cut: set[str]) -> None:
    """Register in the config how this model now differs from a fresh one of its class."""
    before = description_of(denoiser)
    description: dict[str, Any] = copy.deepcopy(before) if before else {"format": 1, "plan": {"units": {}}}
    shapes = description.setdefault("shapes", {})
    for path in sorted(cut):
        parameters = denoiser.get_submodule(path).named_parameters(recurse=False)
        shapes[path] = {name: list(p.shape) for name, p in parameters}
    for group in groups:
        if group.activations and hasattr(denoiser, group.name):
            basis: Any = getattr(denoiser, group.name)
            rank, features = basis.weight.shape
            known = {"activations": list(group.activations), "features": features, "rank": rank}
            description |= {"format": 2, "basis": known}
    description |= described(denoiser)
    attributes = description.setdefault("attributes", {})
    for group in groups:
        for attribute in group.attributes:
            module = denoiser.get_submodule(attribute.module)
            attributes.setdefault(attribute.module, {})[attribute.name] = getattr(module, attribute.name)
    modules = dict(denoiser.named_modules())
    scattered = {n: (m.rows, m.width) for n, m in modules.items() if isinstance(m, ScatteredLinear)}
    ropes = {n: (m.rope_heads, m.rope_count) for n, m in modules.items() if hasattr(m, "rope_heads")}
    biases = {
        n: (torch.tensor(m.bias_heads), m.bias_count) for n, m in modules.items() if hasattr(m, "bias_heads")
    }
    for name, found in (("scattered", scattered), ("ropes", ropes), ("biases", biases)):
        description[name] = {path: packed_rows(*kept) for path, kept in found.items()}
    whole = _composed(PrunePlan.unpacked(description["plan"]["units"]), plan, groups)
    metadata = _in_units_of_the_dense(plan.metadata, before["plan"].get("metadata", {}) if before else {})
    description["plan"] = {"units": whole.packed(), "metadata": metadata}
    if isinstance(denoiser, PreTrainedModel):
        denoiser.config.ecodiff = description
        if before is None:
            denoiser.__class__ = sliced_encoder_class(type(denoiser))  # type: ignore[arg-type]
        return
    if before is None:
        denoiser.__class__ = sliced_class(type(denoiser))  # type: ignore[arg-type]
    denoiser.register_to_config(ecodiff=description)


def description_of(model: nn.Module) -> dict[str, Any] | None:
    """What the config of a pruned denoiser or text encoder says of the cut."""
    config: Any = getattr(model, "config", None)
    return config.get("ecodiff") if isinstance(config, Mapping) else getattr(config, "ecodiff", None)


def slice_like_(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """Cut `model`, in place, as the denoiser `pruned` was, and give it the weights they share. Returns it.

    For what diffusers builds of a denoiser's blocks, which it can only of a dense one: AnimateDiff's
    `UNetMotionModel.from_unet2d(dense.unet, adapter)`, or a ControlNet to be trained,
    `ControlNetModel.from_unet(dense.unet)`. Layers that `pruned` does not have are left as they are.
    (Trained ControlNets need nothing: they work on a pruned denoiser as on the dense one.)

    Raises:
        PlanError: `pruned` is not pruned, or `model` has none of its layers.

    Example:
        >>> motion = UNetMotionModel.from_unet2d(dense.unet, adapter)
        >>> ecodiff.slice_like_(motion, small.unet)
    """
    plan = plan_of(pruned)
    if plan is None:
        raise PlanError(f"This {type(pruned).__name__} is not pruned: there is nothing to cut by.")
    sizes = {group.name: group.size for group in find_groups(model, ALL_KINDS)}
    common = {name: keep for name, keep in plan.items() if sizes.get(name) == len(keep)}
    if not common:
        raise PlanError(
            f"This {type(model).__name__} has none of the layers that the {type(pruned).__name__} lost units "
            "in. Make it of the dense model that was pruned."
        )
    bases = {name: basis for name, basis in plan.bases.items() if name in common}
    slice_(model, PrunePlan(common, plan.metadata, bases))
    own = model.state_dict()
    shared = {n: w for n, w in pruned.state_dict().items() if n in own and own[n].shape == w.shape}
    model.load_state_dict(shared, strict=False)
    return model


def _in_units_of_the_dense(metadata: dict, before: dict) -> dict:
    """What is said of a cut of a cut: the model, its size and the ratio are of the dense model."""
    found = metadata | {
        name: before[name] for name in ("model", "params_dense", "macs_dense") if name in before
    }
    if "basis" in before:
        found["basis"] = before["basis"] + metadata.get("basis", "")
    if "params_dense" in found and "params_pruned" in found:
        found["ratio"] = round(1 - found["params_pruned"] / found["params_dense"], 6)
    return found


def _composed(first: PrunePlan, second: PrunePlan, groups: list[PruneGroup]) -> PrunePlan:
    """The one plan, in units of the dense model, that equals `first` and then `second`."""
    keep: dict[str, Tensor] = dict(first)
    for group in groups:
        chosen, heads = second[group.name], first.get(group.inside)
        size = len(chosen) if heads is None else len(heads) * group.width
        own = keep.get(group.name, torch.ones(size, dtype=torch.bool))
        # Directions of heads that are gone went with them.
        before = own if heads is None else own & heads.repeat_interleave(group.width)
        keep[group.name] = own.clone()
        keep[group.name][before] = chosen
    return PrunePlan(keep)


def plan_of(denoiser: nn.Module) -> PrunePlan | None:
    """The plan that a sliced denoiser was cut by, in units of the dense model; None if dense."""
    description = description_of(denoiser)
    if not description:
        return None
    plan = PrunePlan.unpacked(description["plan"]["units"], description["plan"]["metadata"])
    basis: Any = getattr(denoiser, BASIS, None)
    if basis is not None and basis.weight.device.type != "meta":
        plan.bases[BASIS] = (basis.weight.detach().float().cpu(), basis.lift.float().cpu())
    plan.bases |= bases_of(denoiser, plan)
    return plan


def shared_copy(module: nn.Module) -> Any:
    """A copy of a module whose parameters and buffers are the same tensors."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


def variant(pipe: DiffusionPipeline, plan: PrunePlan | Mapping[str, Tensor]):
    """A pruned pipeline beside the dense one. Weights that are not cut are shared with `pipe`.

    What has state (scheduler, tokenizers) is the variant's own, so both can draw at once. Takes
    milliseconds and the memory of the cut layers. To quantize or train the one and not the other,
    `copy.deepcopy` its denoiser first.

    Raises:
        PlanError: the plan does not fit the pipeline's denoiser.
        UnsupportedModelError: the pipeline carries what cannot be pruned (see `checks`).
    """
    name, dense = denoiser_name(pipe), denoiser_of(pipe)
    check_layers(dense)
    check_calls(dense)
    plan = plan if isinstance(plan, PrunePlan) else PrunePlan(plan)
    if "model" not in plan.metadata and (source := pipe.config.get("_name_or_path")):
        chosen = getattr(pipe, "chosen_denoiser", "")
        known = catalog.find(f"{source}#{chosen}" if chosen else source)
        plan = PrunePlan(plan, plan.metadata | {"model": known.base or known.name})
    pruned = {name: slice_(shared_copy(dense), plan.part())}
    for encoder in plan.text_encoders:
        part = getattr(pipe, encoder, None)
        if not isinstance(part, PreTrainedModel):
            raise PlanError(f"This plan cuts a {encoder}, which this {type(pipe).__name__} does not have.")
        check_layers(part)
        pruned[encoder] = slice_(shared_copy(part), plan.part(encoder))
    # Not from_config: a pipeline may have mended its scheduler.
    parts = pipe.components.items()
    own = {
        n: copy.deepcopy(part)
        for n, part in parts
        if hasattr(part, "save_pretrained") and not isinstance(part, nn.Module)
    }
    small = copy.copy(pipe)
    small.register_modules(**pruned, **own)
    return small
