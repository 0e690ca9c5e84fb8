"""A pruned model in the dense one's shapes, zeros where units were: for tools that know no other shapes."""

import copy
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file

from ..architectures import find_groups
from ..errors import CheckpointError, PlanError
from ..pipelines import denoiser_name, denoiser_of
from ..pruning.slicing import kept_features, plan_of
from ..units import ALL_KINDS
from .saving import open_in_one_dtype


def filled(denoiser: ModelMixin) -> ModelMixin:
    """A dense-shaped model that gives what a pruned one gives. It is no smaller and no faster.

    Raises:
        PlanError: the model is not pruned, or heads were removed under a norm that runs across them:
            zeros would count in its mean.
    """
    plan = plan_of(denoiser)
    if plan is None:
        raise PlanError(f"This {type(denoiser).__name__} is not pruned; it has its dense shapes.")
    config = {name: value for name, value in denoiser.config.items() if name != "ecodiff"}
    base = type(denoiser).__mro__[1]
    with init_empty_weights():
        dense = base.from_config(config)
    for group in find_groups(dense, ALL_KINDS):
        if group.norms and group.name in plan and not plan[group.name].all():
            raise PlanError(f"{group.name} has a norm across its heads: it cannot be filled with zeros.")
    kept, shapes = kept_features(dense, plan), {n: p.shape for n, p in dense.named_parameters()}
    tensors = denoiser.state_dict()
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        for axis, side in enumerate(("out", "in")):
            rows = kept.get((module, side))
            if rows is None or rows.all() or axis >= tensor.ndim or (leaf == "bias" and side == "in"):
                continue
            whole = tensor.new_zeros(*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :])
            tensor = whole.index_copy(axis, rows.nonzero().flatten().to(tensor.device), tensor)
        if tensor.shape != shape:
            raise PlanError(f"{name} is {tuple(tensor.shape)}, and {tuple(shape)} in the dense model.")
        tensors[name] = tensor
    buffers = {name: buffer for name, buffer in dense.named_buffers() if name in tensors}
    dense.load_state_dict({n: tensors[n].contiguous() for n in (*shapes, *buffers)}, assign=True)
    return dense.requires_grad_(False).eval()


def save_filled(pipe, out: str | Path, dtype: torch.dtype | None = None) -> Path:
    """Write a pruned pipeline in dense shapes.

    Args:
        out: a folder for the whole pipeline, or a .safetensors file for its denoiser alone, under
            diffusers' names.
        dtype: of the weights in the files; None: as they are in memory.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
        PlanError: see `filled`.
    """
    out, name = Path(out), denoiser_name(pipe)
    if out.exists():
        raise CheckpointError(f"{out} exists. Name a new folder or file.")
    dense = filled(denoiser_of(pipe))
    try:
        if out.suffix == ".safetensors":
            weights = {k: v.to(dtype or v.dtype).contiguous() for k, v in dense.state_dict().items()}
            out.parent.mkdir(parents=True, exist_ok=True)
            save_file(weights, out, metadata={"format": "pt"})
            return out
        whole = copy.copy(pipe)
        whole.register_modules(**{name: dense})
        parts = {
            n: copy.deepcopy(p) if dtype else p
            for n, p in whole.components.items()
            if hasattr(p, "parameters")
        }
        whole.register_modules(**{n: p.to(dtype) if dtype else p for n, p in parts.items()})
        whole.save_pretrained(out)
        open_in_one_dtype(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Could not write {out}: {error}. Is the disk full?") from None
    return out
