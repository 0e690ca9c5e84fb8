"""What a backward pass keeps and what it computes again: the fastest way that fits into memory.

A trajectory of T denoiser calls, each with activations of A bytes, costs 1 forward and 1 backward pass
if all T A bytes are kept, and nearly 2 forward passes and 1 backward pass if only the last call's are, and
the latents of the others: then A bytes are enough. Between the two, some calls are kept and the others
recomputed. Below, all are recomputed, block by block.
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..architectures.inputs import evenly_routed
from ..errors import exhausted
from ..machine import device_of, free_bytes, release
from ..pipelines import denoiser_calls, denoiser_of, moved
from ..pruning.masking import masked
from ..units import PruneGroup
from .checkpointing import ALL, NOTHING, Keep
from .encodings import Encodings
from .objective import Objective
from .streaming import ROUNDED, stream_, streamed, unstreamed

Made = TypeVar("Made")


@dataclass(frozen=True)
class MemoryPlan:
    """How a trajectory is differentiated.

    Attributes:
        calls: denoiser calls of a trajectory; 0: not counted yet.
        activations: bytes that one call with gradients keeps.
        by_block: the same if blocks are recomputed.
        free: bytes that may be used.
        keep: what is kept of it.
        encoders: bytes that are free as well while text encoders are away.
        streamed: the weights are streamed, layer by layer (`learning.streaming`).
    """

    calls: int
    activations: int
    by_block: int
    free: int
    keep: Keep = NOTHING
    encoders: int = 0
    streamed: bool = False

    @property
    def usable(self) -> int:
        """Bytes that may be used, text encoders away or not."""
        return self.free + self.encoders * self.keep.alone

    @property
    def kept(self) -> int:
        """Calls whose activations are kept; 0 while it is not known how many there are."""
        return int(max(0, self.calls - self.keep.recomputed))

    @property
    def needed(self) -> int:
        """Bytes that are kept at most, besides the weights: the calls that are, or one at a time."""
        return self.by_block if self.keep.blocks else self.activations * max(1, self.kept)

    def words(self) -> str:
        """For people."""
        gigabytes = f"{self.needed / 1e9:.2g} GB of {self.usable / 1e9:.2g} GB that may be used"
        gigabytes += ", text encoders away" * self.keep.alone
        if self.keep.blocks:
            weights = "weights are streamed layer by layer, " if self.streamed else ""
            return f"{weights}every block is computed twice, {gigabytes}"
        if not self.kept:
            return f"every time step is computed twice, {gigabytes}"
        return f"activations of {self.kept} of {self.calls} calls kept, {gigabytes}"

    def smaller(self) -> "MemoryPlan | None":
        """The next plan that needs less; None if there is none."""
        if self.kept > 1:
            return self.keeping(self.kept // 2)
        if self.encoders and not self.keep.alone:
            return self.keeping(1, alone=True)
        return None if self.keep.blocks else replace(self, keep=Keep(blocks=True, alone=self.keep.alone))

    def keeping(self, kept: int, alone: bool = False) -> "MemoryPlan":
        """The same with the activations of the last `kept` calls, if it is known which those are."""
        recomputed = self.calls - kept if self.calls else inf
        return replace(self, keep=Keep(recomputed, alone=alone))


class _Kept:
    """Counts the distinct storages that autograd keeps, those in `own` left out."""

    def __init__(self, own: set[int]):
        self.own = own
        self.sizes: dict[int, tuple[int, Any]] = {}

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.sizes[storage._cdata] = (storage.nbytes(), storage)  # held: addresses are used again
        return tensor

    @property
    def total(self) -> int:
        return sum(size for size, _ in self.sizes.values())

    def watching(self):
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)


class _Attention(torch.autograd.Function):
    """What a fused attention keeps: queries, keys, values and what it gave."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output  # there is no backward: only what is kept is looked at


class _Fused(TorchFunctionMode):
    """Attention as GPUs have it; on the meta device torch would write its matrix out, as CPUs do."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return _Attention.apply(given["query"], given["key"], given["value"])
        return function(*args, **kwargs or {})


class Activations(NamedTuple):
    """Bytes that one call keeps for its backward pass, weights not counted.

    Attributes:
        all: if nothing is recomputed.
        between: if blocks are, what goes into each of them and what is between them.
        inside: of the largest block.
    """

    all: int
    between: int
    inside: int

    @property
    def by_block(self) -> int:
        """If blocks are recomputed."""
        return self.between + self.inside


def activation_bytes(
    denoiser: ModelMixin, args: tuple, kwargs: dict, groups: Iterable[PruneGroup] = ()
) -> Activations:
    """What one call keeps for its backward pass.

    It is found out on the meta device, where nothing is computed and nothing needs memory.

    Args:
        groups: those with gates that are learned. A gate's gradient needs what the gate multiplies.
    """
    device = device_of(denoiser)
    # A copy without weights: some models keep tables that they make in their first call.
    weights = {id(t): torch.empty_like(t, device="meta") for t in denoiser.buffers()}
    for p in denoiser.parameters():
        dtype = denoiser.dtype if p.dtype == ROUNDED else p.dtype
        weights[id(p)] = nn.Parameter(torch.empty_like(p, device="meta", dtype=dtype), False)
    own = {tensor.untyped_storage()._cdata for tensor in weights.values()}
    denoiser = unstreamed(copy.deepcopy(denoiser, weights))
    args, kwargs = moved((args, kwargs), "meta")
    for leaf in tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim > 2:
            leaf.requires_grad_()  # as the latents of every step but the first
    masks = {g.name: torch.ones(g.size, device="meta", requires_grad=True) for g in groups}
    kept, outside, inside = _Kept(own), _Kept(own), []

    def block(function, *inputs, **options):
        for leaf in tree_leaves((inputs, options)):
            if isinstance(leaf, torch.Tensor):
                outside.add(leaf)
        inner = _Kept(own)
        with inner.watching():
            result = function(*inputs, **options)
        inside.append(inner.total)
        return result

    def call(watched: _Kept) -> None:
        attention = _Fused() if device.type != "cpu" else nullcontext()
        routed = evenly_routed(denoiser)
        with torch.enable_grad(), masked(denoiser, masks), attention, routed, watched.watching():
            denoiser(*args, **kwargs)

    call(kept)
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        return Activations(kept.total, 0, kept.total)
    denoiser.enable_gradient_checkpointing(block)
    call(outside)
    return Activations(kept.total, outside.total, max(inside, default=0))


def plan(
    pipe: DiffusionPipeline, call: dict, groups: Iterable[PruneGroup] = (), calls: int = 0, encoders: int = 0
) -> MemoryPlan:
    """The fastest plan that fits.

    Args:
        call: the pipeline's arguments; they fix batch, size and guidance.
        groups: those with gates that are learned.
        calls: denoiser calls of a trajectory; 0: not known, so none is kept.
        encoders: bytes of the text encoders.
    """
    denoiser = denoiser_of(pipe)
    args, kwargs = denoiser_calls(pipe, call, limit=1)[0]
    free = free_bytes(denoiser.device)
    try:
        found = activation_bytes(denoiser, args, kwargs, groups)
        whole, by_block = found.all, found.by_block
    except (RuntimeError, ValueError):  # it looks at values, which meta has not
        whole, by_block = free, free  # so nothing is kept, and less if that is too much
    away = streamed(denoiser)
    encoders = 0 if away or denoiser.device.type == "cpu" else encoders  # they are in main memory already
    return fitted(MemoryPlan(calls, max(1, whole), by_block, free, encoders=encoders, streamed=away))


def fitted(found: MemoryPlan) -> MemoryPlan:
    """The same measurements with as many calls kept as fit; of a streamed model, as little as can be."""
    if found.streamed:
        return replace(found, keep=Keep(blocks=True))
    room = found.free // found.activations
    if room:
        return found.keeping(min(room, found.calls))
    if found.free + found.encoders >= found.activations:
        return found.keeping(1, alone=True)
    return replace(found, keep=Keep(blocks=True, alone=found.encoders > 0))


class Retry:
    """Makes steps with as much kept in memory as fits; where it runs out, a step is made again with less.

    Args:
        groups: those whose gates are learned.
        objective: whose trajectories they are.
        checkpoint: of `LearnConfig`; None: planned at the first step.
        on_plan: told in words what is kept, whenever that changes.
    """

    def __init__(
        self, pipe: DiffusionPipeline, groups, objective: Objective, checkpoint: bool | None, on_plan=None
    ):
        self.pipe, self.groups, self.objective = pipe, groups, objective
        self.checkpoint, self.on_plan = checkpoint, on_plan
        self.plan: MemoryPlan | None = None
        self.encodings = Encodings(pipe)

    @property
    def keep(self) -> Keep:
        if self.plan is None:
            return NOTHING if self.checkpoint else ALL
        return self.plan.keep

    def __call__(self, step: Callable[[Keep], Made]) -> Made:
        """What `step` makes of what may be kept."""
        if self.plan is None and self.checkpoint is None:
            call = self.objective.call(0)
            self._take(plan(self.pipe, call, self.groups, encoders=self.encodings.bytes))
        while True:
            try:
                with self.encodings.used(self.keep.alone):
                    made = step(self.keep)
                break
            except (MemoryError, RuntimeError) as error:
                smaller = self._smaller() if self.plan and exhausted(error) else None
                if smaller is None:
                    raise
            self._take(smaller)
            release()
        if self.plan and not self.plan.calls and self.objective.calls:
            self._take(fitted(replace(self.plan, calls=self.objective.calls)))
        return made

    def _smaller(self) -> MemoryPlan | None:
        """The next plan that needs less; the last is that of weights that come from main memory."""
        assert self.plan is not None
        found, denoiser = self.plan.smaller(), denoiser_of(self.pipe)
        if found is None and denoiser.device.type == "cuda" and not streamed(denoiser):
            stream_(self.pipe, denoiser.device)
            found = fitted(replace(self.plan, encoders=0, streamed=True))
        return found

    def _take(self, found: MemoryPlan) -> None:
        self.plan = found
        if self.on_plan is not None:
            self.on_plan(found.words())
