"""What a backward pass keeps and what it computes again: the fastest way that fits into memory.

A trajectory of T denoiser calls, each with activations of A bytes, costs 1 forward and 1 backward pass
if all T A bytes are kept, and 2 forward passes and 1 backward pass if only the latents are: then A bytes
are enough. Between the two, some calls are kept and the others recomputed. Below, blocks are recomputed
too, inside a call that is.
"""

from dataclasses import dataclass, field, replace

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from . import catalog
from .groups import blocks, denoiser_of, find_groups
from .trajectory import NOTHING, Keep, denoiser_calls, moved

USABLE = 0.8  # of what is free: allocators waste some, and others may come


@dataclass(frozen=True)
class MemoryPlan:
    """How a trajectory is differentiated.

    Attributes:
        calls: denoiser calls of a trajectory; 0: not counted yet.
        activations: bytes that one call with gradients keeps.
        free: bytes that may be used.
        keep: what is kept of it.
    """

    calls: int
    activations: int
    free: int
    keep: Keep = field(default=NOTHING)

    @property
    def needed(self) -> int:
        """Bytes that are kept at most, besides the weights: the calls that are, and one at a time."""
        if self.keep.blocks:
            return self.activations // 2  # an estimate: what a block gives, and one block's inside
        return self.activations * min(self.keep.calls + 1, max(1, self.calls))

    def words(self) -> str:
        """For people."""
        gigabytes = f"{self.needed / 1e9:.2g} GB of {self.free / 1e9:.2g} GB that may be used"
        if self.keep.blocks:
            return f"every block is computed twice, about {gigabytes} (estimate)"
        if not self.calls:
            return f"every time step is computed twice, {gigabytes}"
        return f"activations of {min(self.keep.calls, self.calls)} of {self.calls} calls kept, {gigabytes}"

    def smaller(self) -> "MemoryPlan | None":
        """The next plan that needs less; None if there is none."""
        if self.keep.calls:
            return replace(self, keep=Keep(min(self.keep.calls, self.calls) // 2))
        return None if self.keep.blocks else replace(self, keep=Keep(0, blocks=True))


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device, less a margin."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(USABLE * (torch.cuda.mem_get_info(device)[0] + unused))
    if device.type == "mps":
        return int(USABLE * (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return int(USABLE * psutil.virtual_memory().available)


def exhausted(error: Exception) -> bool:
    """True if an error says that memory ran out, on whatever device."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def estimate(denoiser: nn.Module, model: catalog.Model, batch: int = 4) -> dict[str, int]:
    """Bytes for drawing one image and for learning, before anything was measured: rules of thumb.

    Drawing: all weights, and a tenth more. Learning, with blocks recomputed: besides, for each row of a
    batch (twice as many with guidance) one hidden state a block and 34 more inside one block (Korthikanti
    et al. 2022, arXiv 2205.05198, eq. 2, without attention scores), of a token for 16 x 16 pixels.

    Args:
        denoiser: on any device, "meta" too.
    """
    itemsize = getattr(torch, model.dtype).itemsize
    groups = find_groups(denoiser)
    width = max(denoiser.get_submodule(g.consumers[0].module).weight.shape[0] for g in groups)
    rows = batch * (
        2 if (model.guidance_scale or 0) > 1 and not denoiser.config.get("guidance_embeds") else 1
    )
    hidden = rows * ((model.size or 1024) // 16) ** 2 * width * itemsize
    weights = sum(p.numel() for p in denoiser.parameters()) * itemsize + model.others_gb * 1e9
    return {
        "draw": round(1.1 * weights),
        "learn": round(1.1 * weights + hidden * (len(blocks(groups)) + 34)),
    }


def activation_bytes(denoiser: nn.Module, args: tuple, kwargs: dict) -> int:
    """Bytes that one call keeps for its backward pass, weights not counted."""
    own = {t.untyped_storage()._cdata for t in (*denoiser.parameters(), *denoiser.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for leaf in inputs:
        if leaf.is_floating_point() and leaf.ndim > 2:
            leaf.requires_grad_()  # as the latents of every step but the first
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = denoiser(*args, **kwargs)  # noqa: F841 - or what it keeps is freed while it runs
    return sum(kept.values())


def plan(pipe, call: dict, calls: int = 0) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        call: the pipeline's arguments; they fix batch, size and guidance.
        calls: denoiser calls of a trajectory; 0: not known, so none is kept.
    """
    denoiser = denoiser_of(pipe)
    args, kwargs = moved(denoiser_calls(pipe, call, limit=1)[0], next(denoiser.parameters()).device)
    activations = max(1, activation_bytes(denoiser, args, kwargs))
    free = free_bytes(next(denoiser.parameters()).device)
    return fitted(MemoryPlan(calls, activations, free))


def fitted(found: MemoryPlan) -> MemoryPlan:
    """The same measurements with as many calls kept as fit."""
    room = found.free // found.activations
    if room < 1:
        return replace(found, keep=Keep(0, blocks=True))
    calls = found.calls if room >= found.calls else room - 1
    return replace(found, keep=Keep(calls))
