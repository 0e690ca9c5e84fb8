"""Opens diffusion models that ecodiff pruned, where ecodiff itself is not installed.

This file travels inside every pruned pipeline folder, next to the weights, so that plain
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` works. It needs torch and
diffusers only. `Sliced<Any diffusers model>` is made on demand: an ordinary diffusers model whose
config has one more entry, "ecodiff", which says by which shapes and attributes the pruned model
differs from a fresh one. Nothing else is done: no network, no files but this one.
"""

import base64
import inspect
import os
import shutil
from functools import cache

import diffusers
import torch
from diffusers import ModelMixin
from torch import nn

NAME = "ecodiff_sliced_v1"
FORMAT = 1


class EmptiedAttnProcessor:
    """Attention without heads: nothing is attended to, the output projections' biases remain.

    Without output projections (FLUX's single blocks) the output has no features at all. Some
    processors attend to image and text together and give both (`joint`).
    """

    def __init__(self, joint: bool = False):
        self.joint = joint

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if hasattr(attn, "to_qkv_mlp_proj"):  # FLUX.2: the MLP beside it goes on
            return attn.to_out(attn.mlp_act_fn(attn.to_qkv_mlp_proj(hidden_states)))
        if getattr(attn, "to_out", None) is None:
            return hidden_states[..., :0]
        output = self.bias(attn.to_out[0], hidden_states)
        if getattr(attn, "residual_connection", False):
            output = output + hidden_states
        output = output / getattr(attn, "rescale_output_factor", 1.0)
        if self.joint:
            return output, self.bias(attn.to_out[0], encoder_hidden_states)
        if getattr(attn, "add_q_proj", None) is None:
            return output
        if getattr(attn, "to_add_out", None) is None:
            return output, encoder_hidden_states
        return output, self.bias(attn.to_add_out, encoder_hidden_states)

    def bias(self, projection, hidden_states):
        bias = projection(hidden_states.new_zeros(1, 0))
        if hidden_states.ndim == 4:
            return bias.view(1, -1, 1, 1).expand(len(hidden_states), -1, *hidden_states.shape[2:])
        return bias.expand(*hidden_states.shape[:-1], -1)


def empty_attention(attention: nn.Module) -> None:
    """Let an attention that has no heads left go without."""
    before = type(attention.processor).__name__
    attention.set_processor(
        EmptiedAttnProcessor(joint=before.startswith(("CogView", "CogVideoX", "GlmImage")))
    )


class ScatteredLinear(nn.Linear):
    """A Linear that computes some rows of its output; the others are zeros."""

    def forward(self, x):
        output = x.new_zeros(*x.shape[:-1], self.width)
        return output.index_copy(-1, self.rows, super().forward(x).to(x.dtype))


def scatter(linear: nn.Linear, rows: torch.Tensor, width: int) -> None:
    """Make `linear`, in place, one whose outputs are `rows` of `width` features."""
    linear.__class__ = ScatteredLinear
    linear.register_buffer("rows", rows, persistent=False)
    linear.width = width


def unpacked(bits: list) -> torch.Tensor:
    """Indices from [size, base64 of the bits], most significant bit first."""
    size, text = bits
    data = base64.b64decode(text)
    if type(size) is not int or len(data) != -(-size // 8):
        raise ValueError(f"{len(data)} bytes are not {size!r} bits.")
    return torch.tensor([i for i in range(size) if data[i // 8] >> (7 - i % 8) & 1], dtype=torch.long)


def apply(model: nn.Module, description: dict) -> None:
    """Give a fresh `model` the shapes and attributes of the pruned one. Weights are left empty.

    The description comes from a file, so it is checked: it can only make what exists smaller.
    """
    if description.get("format") != FORMAT:
        raise ValueError(
            f"This model was pruned with format {description.get('format')!r} of ecodiff's files; "
            f"this is format {FORMAT}. Use the newer ecodiff."
        )
    modules = dict(model.named_modules())
    widths = {path: modules[path].out_features for path in description.get("scattered", {})}
    for path, shapes in description["shapes"].items():
        module = modules[path]
        for name, shape in shapes.items():
            old = module._parameters[name]
            if len(shape) != old.ndim or not all(
                type(new) is int and 0 <= new <= size for new, size in zip(shape, old.shape, strict=True)
            ):
                raise ValueError(f"{path}.{name} cannot shrink from {tuple(old.shape)} to {shape}.")
            empty = torch.empty(shape, dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(empty, requires_grad=old.requires_grad))
        set_features(module)
    for path, attributes in description["attributes"].items():
        for name, value in attributes.items():
            old = modules[path].__dict__[name]
            if type(value) is not int or type(old) is not int or not 0 <= value <= old:
                raise ValueError(f"{path}.{name} cannot change from {old!r} to {value!r}.")
            setattr(modules[path], name, value)
    for path, bits in description.get("scattered", {}).items():
        linear, rows = modules[path], unpacked(bits)
        if not isinstance(linear, nn.Linear) or len(rows) != len(linear.weight) or bits[0] != widths[path]:
            raise ValueError(f"{path} does not have {len(rows)} of {bits[0]} rows.")
        scatter(linear, rows, bits[0])
    for path in description["emptied"]:
        empty_attention(modules[path])


def set_features(module: nn.Module) -> None:
    """Let a Linear or a convolution say the shape that its weight has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * (1 if module.groups == 1 else module.weight.shape[0])


@cache
def sliced_class(base: type[ModelMixin]) -> type[ModelMixin]:
    """The class of a pruned `base`: the same model with "ecodiff" as one more config entry."""

    def __init__(self, *args, ecodiff: dict | None = None, **kwargs):
        base.__init__(self, *args, **kwargs)
        self.register_to_config(ecodiff=ecodiff)
        if ecodiff:
            apply(self, ecodiff)

    def save_pretrained(self, save_directory, *args, **kwargs):
        base.save_pretrained(self, save_directory, *args, **kwargs)
        target = os.path.join(save_directory, f"{NAME}.py")
        if not os.path.exists(target) or not os.path.samefile(__file__, target):
            shutil.copyfile(__file__, target)

    # from_config reads the names of the config's entries off this signature.
    signature = inspect.signature(base.__init__)
    extra = inspect.Parameter("ecodiff", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    __init__.__signature__ = signature.replace(parameters=[*parameters, extra])
    members = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": NAME}
    return type(f"Sliced{base.__name__}", (base,), members)


def __getattr__(name: str):
    base = getattr(diffusers, name.removeprefix("Sliced"), None)
    if name.startswith("Sliced") and isinstance(base, type) and issubclass(base, ModelMixin):
        return sliced_class(base)
    raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
