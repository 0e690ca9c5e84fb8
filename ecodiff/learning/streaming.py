"""Learning on a model that is larger than the device: weights come from elsewhere, layer by layer.

Every layer with large weights has them on other devices that lend their memory, or in main memory. When it
is called they are copied to the device, and the copy goes with the call; what a backward pass needs of it,
autograd holds until then. With blocks recomputed (`Keep.blocks`) that is one block's weights at a time: they
are there for the forward pass, again for the recomputation, and gone after their backward pass. Results are
the same to the bit.

diffusers' and accelerate's offloading hooks move the parameter itself, and a backward pass that saved it
would find it elsewhere. So the hooks here are ecodiff's own: they put a copy in its place. A pruned copy of a
streamed denoiser is streamed, too: hooks go with the layers, and look at what they have when they are called.
"""

from collections.abc import Iterator, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..machine import free_bytes
from ..pipelines import denoiser_of
from .encodings import text_encoders

LARGE = 1 << 20  # bytes; what is smaller stays on the device

# What weights are rounded to while units are ranked: as diffusers' layerwise casting, without scales.
ROUNDED = torch.float8_e4m3fn


class _Brought:
    """Brings what a layer has elsewhere to the device for one call."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype  # of what it computes with
        self._away: list[list[tuple[dict, str, Tensor]]] = []

    def before(self, layer: nn.Module, args) -> None:
        away: list[tuple[dict, str, Tensor]] = []
        self._away.append(away)
        for table, name, tensor in _own(layer):
            if tensor.device != self.device or tensor.dtype == ROUNDED:
                away.append((table, name, tensor))
                copied = _copy(tensor, self.device)
                table[name] = _as(copied, self.dtype) if tensor.dtype == ROUNDED else copied

    def after(self, layer: nn.Module, args, output) -> None:
        for table, name, tensor in self._away.pop() if self._away else ():
            table[name] = tensor


class _Settled:
    """Before a model is called, what no layer brings goes to the device for good: what slicing has added."""

    def __init__(self, device: torch.device):
        self.device = device

    def __call__(self, model: nn.Module, args) -> None:
        for layer in model.modules():
            if not _brings(layer):
                _move(layer, self.device)


class _Homes:
    """Where weights wait: on devices that lend their memory, one after the other, then in main memory."""

    def __init__(self, device: torch.device, lenders: Sequence[torch.device]):
        self.device = device
        # Of its own memory it lends half: the other half is what it computes in.
        self.left = {one: free_bytes(one) // (2 if one == device else 1) for one in lenders}

    def take(self, tensor: Tensor) -> Tensor:
        for lender, left in self.left.items():
            if tensor.nbytes <= left:
                self.left[lender] -= tensor.nbytes
                return _copy(tensor, lender)
        here = tensor.detach().to("cpu")
        here = here.pin_memory() if self.device.type == "cuda" else here
        return nn.Parameter(here, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else here


def stream_(
    pipe: DiffusionPipeline,
    device: str | torch.device,
    large: int = LARGE,
    lenders: Sequence[torch.device] = (),
    rounded: bool = False,
) -> None:
    """Put a pipeline on a device, but for the large weights of its denoiser and text encoders.

    Those stay on `lenders` or in main memory (pinned, for a GPU of CUDA's), and each is on the device only
    while its layer works: slower, and right for learning, drawing, slicing and repairing.

    Args:
        large: bytes of a tensor that is not kept on the device.
        lenders: other devices, which lend what is free of their memory; they do not compute.
        rounded: large matrices of the denoiser are kept in float8, half of 16 bits, and first of all on the
            device itself. Units can be ranked on it; what is cut are the full weights, opened once more.
    """
    device = torch.empty(0, device=device).device  # "cuda" is the one in use
    streamed_parts = [denoiser_of(pipe), *text_encoders(pipe).values()]
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and all(part is not other for other in streamed_parts):
            part.to(device)
    homes = _Homes(device, [*([device] if rounded else []), *lenders])
    for part in streamed_parts:
        _stream(part, homes, large, rounded and part is streamed_parts[0])


def streamed(model: nn.Module) -> bool:
    """True if the weights of a model come from elsewhere, layer by layer."""
    return any(isinstance(hook, _Settled) for hook in model._forward_pre_hooks.values())


def unstreamed(model: nn.Module) -> nn.Module:
    """Take the hooks off a copy of a model, which then is where it is. Returns it."""
    for layer in model.modules():
        for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", hook), _Brought | _Settled):
                    del hooks[key]
                    layer._forward_hooks_always_called.pop(key, None)
    return model


def is_rounded(model: nn.Module) -> bool:
    """True if weights of a model are in float8."""
    return any(parameter.dtype == ROUNDED for parameter in model.parameters())


def _stream(model: nn.Module, homes: _Homes, large: int, rounded: bool) -> None:
    if streamed(model):
        return
    device = homes.device
    first = next(model.parameters(), None)  # it tells diffusers and transformers where the model is
    for layer in model.modules():
        away = [part for part in _own(layer) if part[2] is not first and part[2].nbytes >= large]
        for table, name, tensor in away:
            table[name] = homes.take(_as(tensor, ROUNDED) if rounded and tensor.ndim > 1 else tensor)
        for table, name, tensor in _own(layer):
            if all(name != other for _, other, _ in away):
                table[name] = _copy(tensor, device)
        if not away:
            continue
        brought = _Brought(device, away[0][2].dtype)
        layer.register_forward_pre_hook(brought.before, prepend=True)
        layer.register_forward_hook(brought.after, always_call=True)
    model.register_forward_pre_hook(_Settled(device), prepend=True)


def _own(layer: nn.Module) -> Iterator[tuple[dict, str, Tensor]]:
    """A layer's parameters and buffers, not those of layers in it: (table, name, tensor)."""
    for table in (layer._parameters, layer._buffers):
        for name, tensor in list(table.items()):
            if tensor is not None:
                yield table, name, tensor


def _brings(layer: nn.Module) -> bool:
    hooks = layer._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), _Brought) for hook in hooks)


def _move(layer: nn.Module, device: torch.device) -> None:
    for table, name, tensor in _own(layer):
        if tensor.device != device:
            table[name] = _copy(tensor, device)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    made = tensor.detach().to(dtype)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
