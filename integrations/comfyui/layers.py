"""Pruned models in ComfyUI's own: layers that take the shape of what is loaded, attentions with fewer heads.

ComfyUI makes a model of dense shapes first (on the CPU, without values). `shaped` lets every layer of it
take the shape of the tensor that is loaded; `fit` then tells attentions and blocks how wide they became.
Only torch is needed here, so that it can be tested without ComfyUI.
"""

from functools import cache

import torch
from torch import nn

BASIS = "modulation_basis"
MODULATION = (".lin", "adaLN_modulation.1", "img_mod.1", "txt_mod.1", "norm_out.linear")


def shaped(operations: type, norm_groups: int = 32) -> type:
    """`operations` (of comfy.ops) with layers that take the shape of what is loaded.

    Args:
        norm_groups: of every GroupNorm in the dense model; ComfyUI takes 32 for granted.
    """

    class Linear(operations.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            _take_shapes(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.out_features, self.in_features = self.weight.shape  # quantised ones come into being here

    class Conv2d(operations.Conv2d):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            _take_shapes(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.out_channels, self.in_channels = self.weight.shape[:2]

    class GroupNorm(operations.GroupNorm):
        def __init__(self, num_groups, num_channels, *args, **kwargs):
            super().__init__(norm_groups, num_channels, *args, **kwargs)
            self.width = num_channels // norm_groups

        def _load_from_state_dict(self, state_dict, prefix, *args):
            _take_shapes(self, state_dict, prefix)
            self.num_channels = len(self.weight)
            self.num_groups = self.num_channels // self.width
            super()._load_from_state_dict(state_dict, prefix, *args)

    return type("Shaped", (operations,), {"Linear": Linear, "Conv2d": Conv2d, "GroupNorm": GroupNorm})


def _take_shapes(module: nn.Module, state_dict: dict, prefix: str) -> None:
    for name, old in list(module._parameters.items()):
        new = state_dict.get(prefix + name)
        if old is None or new is None or new.shape == old.shape:
            continue
        if len(new.shape) != old.ndim or any(n > o for n, o in zip(new.shape, old.shape, strict=True)):
            raise ValueError(f"{prefix}{name} is {tuple(new.shape)}, and {tuple(old.shape)} when dense.")
        setattr(module, name, nn.Parameter(old.new_empty(new.shape), requires_grad=old.requires_grad))


def fit(model: nn.Module, heads: dict) -> None:
    """Tell attentions, or blocks of FLUX, how many heads they have.

    Args:
        heads: of each that attends, by its path in `model`.
    """
    for path, count in heads.items():
        module = model.get_submodule(path)
        if hasattr(module, "to_q"):
            module.heads = count
        elif hasattr(module, "n_local_heads"):  # Z-Image
            module.n_local_heads = module.n_local_kv_heads = module.n_kv_heads = count
        else:
            module.num_heads = count
        if hasattr(module, "linear1"):  # a single block of FLUX: its attention and its MLP share two layers
            given, made = module.linear1.out_features, module.linear2.in_features
            module.hidden_size = (given - made) // 2
            module.mlp_hidden_dim = made - module.hidden_size
        if count == 0:
            module.__class__ = _emptied(type(module))


@cache
def _emptied(base: type) -> type:
    """A module of which no head is left: what does not attend goes on, an output layer gives its bias."""

    def attention(self, x, context=None, value=None, mask=None, **kwargs):
        return self.to_out(x[..., :0])

    def joint(self, hidden_states, encoder_hidden_states, **kwargs):
        return self.to_out[0](hidden_states[..., :0]), self.to_add_out(encoder_hidden_states[..., :0])

    def fused(self, x, *args, **kwargs):
        return self.out(x[..., :0])

    def single(self, x, vec, pe, attn_mask=None, modulation_dims=None, transformer_options=None):
        mod, _ = self.modulation(vec)
        hidden = self.mlp_act(self.linear1((1 + mod.scale) * self.pre_norm(x) + mod.shift))
        return x + mod.gate * self.linear2(hidden)

    def double(
        self, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None, modulation_dims_txt=None,
        transformer_options=None,
    ):  # fmt: skip
        done = []
        for x, name in ((img, "img"), (txt, "txt")):
            first, second = getattr(self, f"{name}_mod")(vec)
            attended, norm, mlp = (getattr(self, f"{name}_{part}") for part in ("attn", "norm2", "mlp"))
            x = x + first.gate * attended.proj(x[..., :0])
            x = x + second.gate * mlp((1 + second.scale) * norm(x) + second.shift)
            done.append(x)
        return tuple(done)

    forwards = {"CrossAttention": attention, "Attention": joint, "JointAttention": fused}
    forwards["SingleStreamBlock"] = single
    forward = forwards.get(base.__name__, double)
    return type(f"Emptied{base.__name__}", (base,), {"forward": forward})


@cache
def _projected(base: type) -> type:
    """A modulation layer that reads the model's one projection of the embedding.

    Its tensors keep their names, so that ComfyUI loads, moves and patches them as it does any others.
    """

    def forward(self, x):
        return base.forward(self, self.basis[0](x))

    return type(f"Projected{base.__name__}", (base,), {"forward": forward})


def project(model: nn.Module, operations: type, features: int, rank: int, dtype, device) -> None:
    """Give a transformer a projection of its embedding, read by every modulation layer."""
    basis = operations.Linear(features, rank, bias=False, dtype=dtype, device=device)
    model.add_module(BASIS, basis)
    for path, module in list(model.named_modules()):
        if path.endswith(MODULATION):
            module.basis = (basis,)  # not a child of each: it is loaded once
            module.__class__ = _projected(type(module))
            module.in_features = rank
            if module.weight is not None:  # of quantised layers it comes with its file
                empty = torch.empty(module.out_features, rank, dtype=dtype, device=device)
                module.weight = nn.Parameter(empty, requires_grad=False)
