"""Export in dense shapes: opens wherever the dense model does, and is no smaller."""

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from ..architectures import find_groups
from ..errors import CheckpointError, PlanError
from ..pipelines import denoiser_name, denoiser_of
from ..pruning.components import plan_of_pipeline
from ..pruning.slicing import kept_features, plan_of
from ..storage import write_tensors
from ..units import ALL_KINDS, BASIS
from .export import format
from .saving import open_in_one_dtype, whole_folder


def filled(denoiser: Any) -> Any:
    """A dense-shaped denoiser or text encoder that gives what a pruned one gives. No smaller, no faster.

    Raises:
        PlanError: the model is not pruned, or heads were removed under a norm that runs across them:
            zeros would count in its mean.
    """
    plan = plan_of(denoiser)
    if plan is None:
        raise PlanError(f"This {type(denoiser).__name__} is not pruned; it has its dense shapes.")
    dense = _empty(denoiser)
    for group in find_groups(dense, ALL_KINDS):
        if group.norms and group.name in plan and not plan[group.name].all():
            raise PlanError(f"{group.name} has a norm across its heads: it cannot be filled with zeros.")
    kept, shapes = kept_features(dense, plan), {n: p.shape for n, p in dense.named_parameters()}
    tensors, tied = denoiser.state_dict(), isinstance(denoiser, PreTrainedModel)
    basis: Any = getattr(denoiser, BASIS, None)
    directed = {s.module for g in find_groups(dense, ALL_KINDS) if g.activations for s in g.consumers}
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        tensor = tensors[name]
        if basis is not None and module in directed and leaf == "weight":  # the factors are multiplied out
            tensor = (tensor.float() @ basis.weight.float()).to(tensor.dtype)
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
    dense.load_state_dict(
        {n: tensors[n].contiguous() for n in (*shapes, *buffers)}, assign=True, strict=not tied
    )
    if tied:
        dense.tie_weights()
    return dense.requires_grad_(False).eval()


def _empty(pruned: Any) -> Any:
    """The dense model that a pruned one was cut from, without its weights."""
    base: Any = type(pruned).__mro__[1]
    with init_empty_weights():
        if isinstance(pruned, PreTrainedModel):
            config = copy.deepcopy(pruned.config)
            del config.ecodiff
            return base(config)
        return base.from_config({n: value for n, value in pruned.config.items() if n != "ecodiff"})


@format("dense", "as large and as slow as the dense model: zeros are computed too")
def save_filled(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline in dense shapes.

    Args:
        out: a folder for the whole pipeline, or a .safetensors file for its denoiser alone, under
            diffusers' names.
        dtype: of the weights in the files; None: as they are in memory.
        card: text of a folder's README.md, if any.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
        PlanError: see `filled`.
    """
    out, name = Path(out), denoiser_name(pipe)
    if out.exists():
        raise CheckpointError(f"{out} exists. Name a new folder or file.")
    dense = filled(denoiser_of(pipe))
    if out.suffix == ".safetensors":
        weights = {name: weight.to(dtype or weight.dtype) for name, weight in dense.state_dict().items()}
        return write_tensors(out, weights, {"format": "pt"})
    whole = copy.copy(pipe)
    plan = plan_of_pipeline(pipe)
    encoders = {n: filled(getattr(pipe, n)) for n in (plan.text_encoders if plan else ())}
    whole.register_modules(**{name: dense}, **encoders)
    parts = {
        n: copy.deepcopy(p) if dtype else p for n, p in whole.components.items() if hasattr(p, "parameters")
    }
    whole.register_modules(**{n: p.to(dtype) if dtype else p for n, p in parts.items()})
    with whole_folder(out.resolve()) as partial:
        whole.save_pretrained(partial)
        open_in_one_dtype(partial)
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return out
