"""Opens diffusion models that ecodiff pruned, where ecodiff itself is not installed.

This file travels inside every pruned pipeline folder, next to the weights, so that plain
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` works. It needs torch,
diffusers and transformers only. `Sliced<Any diffusers model>` (or text encoder of transformers) is
made on demand: an ordinary model whose config has one more entry, "ecodiff", which says by which
shapes and attributes the pruned model differs from a fresh one. Nothing else is
done: no network, no files but this one.
"""

import base64
import copyreg
import inspect
import os
import shutil
from functools import cache

import diffusers
import torch
import transformers
from diffusers import ModelMixin
from diffusers.loaders import peft
from diffusers.models.attention_processor import AttnAddedKVProcessor
from torch import nn
from transformers import PreTrainedModel

NAME = "ecodiff_sliced_v1"
# 4: of models cut inside their queries and keys; 3: inside what heads give; 2: of those with a shared
# projection; 1: of all others.
FORMAT = 4
BASIS = "modulation_basis"
DIRECTIONS = {"values": "directions", "queries": "query_directions"}  # buffers, entries of a description
QUERIES = ("to_q", "add_q_proj")
AROUND_HEADS = (*QUERIES, "to_k", "add_k_proj", "to_v", "add_v_proj", "to_out.0", "to_add_out")


class EmptiedAttnProcessor:
    """Attention without heads: nothing is attended to, the output projections' biases remain.

    Without output projections (FLUX's single blocks) the output has no features at all. Some
    processors attend to image and text together and give both (`joint`); some add what they were
    given whatever the module says (`residual`).
    """

    def __init__(self, joint: bool = False, residual: bool = False):
        self.joint, self.residual = joint, residual

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        if hasattr(attn, "to_qkv_mlp_proj"):  # FLUX.2: the MLP beside it goes on
            return attn.to_out(attn.mlp_act_fn(attn.to_qkv_mlp_proj(hidden_states)))
        own = self.projection(attn, ("to_out", "out_layer", "img_attn_proj"))
        if own is None:
            none = hidden_states[..., :0]
            return none if encoder_hidden_states is None else (none, encoder_hidden_states[..., :0])
        output = self.bias(own, hidden_states)
        if self.residual or getattr(attn, "residual_connection", False):
            output = output + hidden_states
        output = output / getattr(attn, "rescale_output_factor", 1.0)
        if self.joint:
            return output, self.bias(own, encoder_hidden_states)
        other = self.projection(attn, ("to_add_out", "to_out_t", "txt_attn_proj"))
        if other is not None:
            return output, self.bias(other, encoder_hidden_states)
        return output if getattr(attn, "add_q_proj", None) is None else (output, encoder_hidden_states)

    def projection(self, attn, names):
        found = next((getattr(attn, n) for n in names if getattr(attn, n, None) is not None), None)
        return found[0] if isinstance(found, nn.ModuleList) else found

    def bias(self, projection, hidden_states):
        bias = projection(hidden_states.new_zeros(1, 0))
        if hidden_states.ndim == 4:
            return bias.view(1, -1, 1, 1).expand(len(hidden_states), -1, *hidden_states.shape[2:])
        return bias.expand(*hidden_states.shape[:-1], -1)


def fit_processor(attention: nn.Module) -> None:
    """Give an attention that lost heads a processor that can do without them."""
    processor = getattr(attention, "processor", None)
    before = type(processor).__name__
    if getattr(attention, "heads", getattr(attention, "num_heads", None)) == 0:
        joint = before.startswith(("CogView", "CogVideoX", "GlmImage"))
        attention.emptied = EmptiedAttnProcessor(joint, residual=before.startswith("AttnAddedKV"))
        attention.__class__ = emptied_class(type(attention))
        return
    if getattr(attention, "heads", 0) == getattr(attention, "sliceable_head_dim", 0) == 1:
        attention.sliceable_head_dim = 2  # diffusers' attention slicing halves it
    if before == "AttnAddedKVProcessor2_0":  # it takes the heads' width for the residual's
        attention.processor = AttnAddedKVProcessor()


class _Emptied(type):
    """Of attentions without heads. Pickled by what it was made of, as `_Sliced` is."""


@cache
def emptied_class(base: type) -> type:
    """An attention without heads: whatever processor it is given, it works as `EmptiedAttnProcessor` does.

    It has no heads that could be sliced or projections that could be fused, and says so to nobody.
    """

    named = inspect.signature(base.forward).parameters

    def forward(self, *args, **kwargs):
        # What goes on to a processor is not read here, and diffusers would warn of it at every call.
        kwargs = {name: value for name, value in kwargs.items() if name in named}
        given, self.__dict__["processor"] = self.__dict__.get("processor"), self.emptied
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            if given is None:
                del self.__dict__["processor"]
            else:
                self.__dict__["processor"] = given

    def nothing(self, *args, **kwargs):
        return None

    members = {"forward": forward, "__module__": NAME, "set_attention_slice": nothing}
    members |= {"fuse_projections": nothing, "unfuse_projections": nothing}
    # diffusers divides by it, and refuses a slice that is larger.
    members["sliceable_head_dim"] = property(lambda self: 1, lambda self, value: None)
    return _Emptied(f"Emptied{base.__name__}", (base,), members)


def gather_rope(attention: nn.Module, heads: torch.Tensor, count: int) -> None:
    """Let an attention that kept `heads` of `count` read its own part of every head's positions."""
    attention.register_buffer("rope_heads", heads, persistent=False)
    if not hasattr(attention, "rope_count"):
        attention.register_forward_pre_hook(_own_rope, with_kwargs=True)
    attention.rope_count = count


def _own_rope(attention, args, kwargs):
    heads, count = attention.rope_heads, attention.rope_count
    width = attention.to_q.out_features // max(1, len(heads))

    def own(table):
        if table.shape[-1] == count * width:  # (..., heads * features)
            return table.unflatten(-1, (count, -1)).index_select(-2, heads).flatten(-2)
        # (tokens, heads, features), or of LTX-2 (batch, heads, tokens, features)
        return table.index_select(1 if table.ndim == 4 else -2, heads)

    for name in ("image_rotary_emb", "query_rotary_emb", "key_rotary_emb"):
        if kwargs.get(name) is not None:
            kwargs = kwargs | {name: tuple(own(table) for table in kwargs[name])}
    return args, kwargs


def share_bias(attention: nn.Module, heads: list, count: int) -> None:
    """Let a T5 attention that kept `heads` of `count` read its own part of the biases that layers share."""
    attention.bias_heads, attention.bias_count = heads, count
    if not isinstance(type(attention), _SharedBias):
        attention.__class__ = shared_bias_class(type(attention))


class _SharedBias(type):
    """Of attentions that read a part of their position biases. Pickled by what it was made of."""


@cache
def shared_bias_class(base: type) -> type:
    """A T5 attention of fewer heads than there are position biases; it hands on all of them."""

    def forward(self, hidden_states, *args, position_bias=None, **kwargs):
        if position_bias is None:
            tokens = hidden_states.shape[1]
            if self.has_relative_attention_bias:
                position_bias = self.compute_bias(tokens, tokens, device=hidden_states.device)
            else:
                position_bias = hidden_states.new_zeros(1, self.bias_count, tokens, tokens)
        own = position_bias[:, self.bias_heads]
        output = base.forward(self, hidden_states, *args, position_bias=own, **kwargs)
        return (output[0], position_bias, *output[2:])

    return _SharedBias(f"SharedBias{base.__name__}", (base,), {"forward": forward, "__module__": NAME})


class ScatteredLinear(nn.Linear):
    """A Linear that computes some rows of its output; the others are zeros."""

    def forward(self, x):
        output = x.new_zeros(*x.shape[:-1], self.width)
        # Indices are real on the meta device too, which knows no other device in one operation.
        return output.index_copy_(-1, self.rows.to(x.device), super().forward(x).to(x.dtype))


def scatter(linear: nn.Linear, rows: torch.Tensor, width: int) -> None:
    """Make `linear`, in place, one whose outputs are `rows` of `width` features."""
    linear.__class__ = ScatteredLinear
    linear.register_buffer("rows", rows, persistent=False)
    linear.width = linear.out_features = width  # adapters are sized by it


class SharedBasis(nn.Linear):
    """z = Z s, of the vector that all AdaLN layers read. `lift`, Y, is for adapters of the dense layers."""

    def __init__(self, features, rank):
        super().__init__(features, rank, bias=False)
        self.register_buffer("lift", torch.empty(features, rank))


class Projected(nn.Module):
    """An activation whose output is projected by the model's one basis, for the layer that reads it."""

    def __init__(self, activation, basis):
        super().__init__()
        self.activation = activation
        self.basis = (basis,)  # not a child of each: it is saved once, and moved with the model

    def forward(self, x):
        return self.basis[0](self.activation(x))


def project(model: nn.Module, activations: list, features: int, rank: int) -> None:
    """Give `model` a basis of `rank` directions of `features`, read behind each of `activations`."""
    if not 0 < rank <= features:
        raise ValueError(f"{rank} directions of {features} features are no projection.")
    model.add_module(BASIS, SharedBasis(features, rank))
    for path in activations:
        parent, _, name = path.rpartition(".")
        parent = model.get_submodule(parent)
        parent._modules[name] = Projected(parent._modules[name], getattr(model, BASIS))


FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


class Through:
    """A module as its own code sees it while some of its children give or read fewer features than they did.

    What such a child gives is spread over all features there were, zeros between; of what it is to read it
    gets those that are left. The child itself, and what is added to it (LoRA), knows nothing of it. Where all
    layers around the heads are cut, heads are only as wide as what is left of them (`lay_out`).
    """

    def __init__(self, module):
        self.module = module

    def __getattr__(self, name):
        partly = self.module.partly
        if name in FUSED and not hasattr(self.module, name):  # by a processor that fuses, given it later
            return lambda x: torch.cat([getattr(self, part)(x) for part in FUSED[name]], dim=-1)
        found = getattr(self.module, name)
        if name in partly:
            return self.child(found, name)
        if f"{name}.0" in partly:  # a list, of a Linear and a dropout
            return [self.child(found[0], f"{name}.0"), *found[1:]]
        return found

    def child(self, child, name):
        axis, width, _ = self.module.partly[name]
        index, (before, now) = getattr(self.module, _index_of(name)), self.module.head_widths
        width = width // before * now
        if axis == "in":
            if len(index) == width:
                return child
            # On a CPU index_select takes some twenty times as long in the last dimension.
            return lambda x, *args: child(x.gather(-1, index.expand(*x.shape[:-1], -1)), *args)
        # Scores are divided by the root of the heads' width, which is another one now.
        factor = (now / before) ** 0.5 if name in QUERIES else 1

        def spread(x, *args):
            output = child(x, *args)
            if factor != 1:
                output = output * factor
            if len(index) == width:
                return output
            where = index.to(output.device)  # see ScatteredLinear
            return output.new_zeros(*output.shape[:-1], width).index_copy_(-1, where, output)

        return spread


def _index_of(child: str) -> str:
    return f"{child.replace('.', '_')}_features"


class _Partly(type):
    """Of modules that see some of their children `Through`. Pickled by what it was made of."""


@cache
def partly_class(base: type) -> type:
    """A module some of whose children are cut inside the heads: its code runs on `Through`."""

    own = base.forward  # torch.compile follows functions, and no attributes of classes

    def forward(self, *args, **kwargs):
        return own(Through(self), *args, **kwargs)

    def nothing(self, *args, **kwargs):
        return None

    members = {"forward": forward, "__module__": NAME}
    members |= {name: nothing for name in ("fuse_projections", "unfuse_projections") if hasattr(base, name)}
    return _Partly(f"Partly{base.__name__}", (base,), members)


def see_through(module: nn.Module, child: str, axis: str, index: torch.Tensor, width: int) -> None:
    """Let `module` see its `child` as wide as `width`, of which it gives ("out") or reads ("in") `index`.

    Once that is said of all of its children, `lay_out` it.
    """
    if not hasattr(module, "partly"):
        module.__class__, module.partly = partly_class(type(module)), {}
        module.dense_scale = getattr(module, "scale", None)
    module.partly[child] = (axis, width, index)


def lay_out(module: nn.Module, device) -> None:
    """Give what is left of each head its place in heads that are as narrow as all of a module's can be.

    Args:
        device: where indices belong, which are on the CPU until then.
    """
    before, now = module.head_widths = head_widths(module)
    if before > now:
        module.scale = now**-0.5  # of processors that do not leave it to torch
        fit_processor(module)
    for child, (_, _, index) in module.partly.items():
        if now < before:
            heads = index // before
            number = torch.arange(len(index), device="cpu")
            index = heads * now + number - torch.searchsorted(heads, heads)
        module.register_buffer(_index_of(child), index.to(device), persistent=False)


def head_widths(module: nn.Module) -> tuple:
    """How wide an attention's heads were and have to be, in eights; 1 and 1 if not all around them is cut."""
    children, heads = dict(module.named_modules()), getattr(module, "heads", 0)
    around = {name for name in AROUND_HEADS if isinstance(children.get(name), nn.Linear)}
    if not heads or "to_q" not in around or not around <= module.partly.keys():
        return 1, 1
    width = module.partly["to_q"][1] // heads
    if module.dense_scale != width**-0.5 or any(module.partly[n][1] != heads * width for n in around):
        return 1, 1
    most = max(int(torch.bincount(module.partly[name][2] // width).max()) for name in around)
    return width, min(width, -(-most // 8) * 8)


def see_all_(module: nn.Module) -> None:
    """Undo `see_through`, of a module whose children are whole again."""
    buffers = [f"{name}_{part}" for name in DIRECTIONS for part in ("project", "lift")]
    for name in (*map(_index_of, module.partly), *buffers):
        module._buffers.pop(name, None)
    module.__class__ = type(module).__mro__[1]
    if module.dense_scale is not None:
        module.scale = module.dense_scale
    del module.partly, module.dense_scale, module.head_widths


def features_of(module: nn.Module, child: str) -> tuple:
    """Which features of how many a child that is cut inside the heads gives or reads: (index, width)."""
    _, width, index = module.partly[child]
    return index, width


def places(bits: list) -> list:
    """Indices from [size, base64 of the bits], most significant bit first."""
    size, text = bits
    data = base64.b64decode(text)
    if type(size) is not int or len(data) != -(-size // 8):
        raise ValueError(f"{len(data)} bytes are not {size!r} bits.")
    return [i for i in range(size) if data[i // 8] >> (7 - i % 8) & 1]


def unpacked(bits: list) -> torch.Tensor:
    """The same as a tensor, which is real for a model on the meta device too."""
    return torch.tensor(places(bits), dtype=torch.long, device="cpu")


def apply(model: nn.Module, description: dict) -> None:
    """Give a fresh `model` the shapes and attributes of the pruned one. Weights are left empty.

    The description comes from a file, so it is checked: it can only make what exists smaller.
    """
    if description.get("format") not in range(1, FORMAT + 1):
        raise ValueError(
            f"This model was pruned with format {description.get('format')!r} of ecodiff's files; "
            f"this file knows 1 to {FORMAT}. Use the newer ecodiff."
        )
    if basis := description.get("basis"):
        project(model, basis["activations"], basis["features"], basis["rank"])
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
    for path in description["attributes"]:
        fit_processor(modules[path])
    for path, bits in description.get("ropes", {}).items():
        heads = unpacked(bits)
        if len(heads) != modules[path].heads:
            raise ValueError(f"{path} does not have {len(heads)} of {bits[0]} heads.")
        gather_rope(modules[path], heads, bits[0])
    for path, bits in description.get("biases", {}).items():
        heads = places(bits)
        if len(heads) != modules[path].n_heads:
            raise ValueError(f"{path} does not have {len(heads)} of {bits[0]} heads.")
        share_bias(modules[path], heads, bits[0])
    _apply_partly(modules, description)


def _apply_partly(modules: dict, description: dict) -> None:
    """What is cut inside its heads, and the directions that are left of them."""
    for path, children in description.get("partly", {}).items():
        for child, (axis, bits) in children.items():
            linear, index = modules[path].get_submodule(child), unpacked(bits)
            size = linear.weight.shape[axis == "in"] if axis in ("in", "out") else -1
            if not isinstance(linear, nn.Linear) or len(index) != size:
                raise ValueError(f"{path}.{child} does not have {len(index)} of {bits[0]} features.")
            see_through(modules[path], child, axis, index, bits[0])
        lay_out(modules[path], "cpu")
    for name, entry in DIRECTIONS.items():
        for path, (count, width) in description.get(entry, {}).items():
            given = [m.out_features for m in modules[path].modules() if isinstance(m, nn.Linear)]
            if type(width) is not int or not 0 < width <= 1 << 16 or count not in given:
                raise ValueError(f"{path} does not give {count} directions.")
            set_directions(modules[path], name, *torch.empty(2, count, width))


def set_directions(attention: nn.Module, name: str, project: torch.Tensor, lift: torch.Tensor) -> None:
    """Keep the directions that are left, (count, width) each, for adapters of the dense layers."""
    attention.register_buffer(f"{name}_project", project)
    attention.register_buffer(f"{name}_lift", lift)


def set_features(module: nn.Module) -> None:
    """Let a Linear, a convolution or a norm say the shape that its weight has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
        module.out_channels = module.weight.shape[0]
        module.in_channels = module.weight.shape[1] * (1 if module.groups == 1 else module.weight.shape[0])


def refuse_ip_adapter(self, *args, **kwargs):
    """In place of diffusers' loader of IP-Adapters, which would fail later and in other words."""
    raise ValueError(
        "This model is pruned: an IP-Adapter of the dense model has keys and values for heads that are gone. "
        "Use it on the dense model."
    )


class _Sliced(type(ModelMixin)):
    """Of pruned classes: equal to the class that was pruned, which diffusers' `from_pipe` asks for."""

    def __eq__(cls, other):
        return other is cls or other is cls.__mro__[1]

    def __hash__(cls):
        return hash(cls.__mro__[1])


class _SlicedEncoder(_Sliced):
    """Of pruned text encoders. transformers looks up what a class can record under its repr."""

    def __repr__(cls):
        return repr(cls.__mro__[1])


# A process that is spawned finds this file by the name it was opened under, but no class made on demand.
copyreg.pickle(_Sliced, lambda cls: (sliced_class, cls.__bases__))
copyreg.pickle(_SlicedEncoder, lambda cls: (sliced_encoder_class, cls.__bases__))
copyreg.pickle(_Partly, lambda cls: (partly_class, cls.__bases__))
copyreg.pickle(_Emptied, lambda cls: (emptied_class, cls.__bases__))
copyreg.pickle(_SharedBias, lambda cls: (shared_bias_class, cls.__bases__))


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
        _add_this_file(save_directory)

    save_pretrained.__signature__ = inspect.signature(base.save_pretrained)  # diffusers asks what it takes

    def set_adapters(self, *args, **kwargs):
        # diffusers knows the blocks of a class that can be scaled by its name.
        scaled = getattr(peft, "_SET_ADAPTER_SCALE_FN_MAPPING", {})
        if base.__name__ in scaled:
            scaled[f"Sliced{base.__name__}"] = scaled[base.__name__]
        return base.set_adapters(self, *args, **kwargs)

    # from_config reads the names of the config's entries off this signature.
    signature = inspect.signature(base.__init__)
    extra = inspect.Parameter("ecodiff", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    __init__.__signature__ = signature.replace(parameters=[*parameters, extra])
    members = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": NAME}
    if hasattr(base, "_load_ip_adapter_weights"):
        members["_load_ip_adapter_weights"] = refuse_ip_adapter
    if hasattr(base, "set_adapters"):
        members["set_adapters"] = set_adapters
    return _Sliced(f"Sliced{base.__name__}", (base,), members)


@cache
def sliced_encoder_class(base: type) -> type:
    """The class of a pruned text encoder: the same model of transformers, whose config has "ecodiff" too."""

    def __init__(self, config, *args, **kwargs):
        base.__init__(self, config, *args, **kwargs)
        if getattr(config, "ecodiff", None):
            apply(self, config.ecodiff)

    def save_pretrained(self, save_directory, *args, **kwargs):
        base.save_pretrained(self, save_directory, *args, **kwargs)
        _add_this_file(save_directory)

    save_pretrained.__signature__ = inspect.signature(base.save_pretrained)  # diffusers asks what it takes
    members = {"__init__": __init__, "save_pretrained": save_pretrained, "__module__": NAME}
    return _SlicedEncoder(f"Sliced{base.__name__}", (base,), members)


def _add_this_file(folder) -> None:
    target = os.path.join(folder, f"{NAME}.py")
    if not os.path.exists(target) or not os.path.samefile(__file__, target):
        shutil.copyfile(__file__, target)


def __getattr__(name: str):
    if name.startswith("Sliced"):
        base = getattr(diffusers, name.removeprefix("Sliced"), None)
        if isinstance(base, type) and issubclass(base, ModelMixin):
            return sliced_class(base)
        base = getattr(transformers, name.removeprefix("Sliced"), None)
        if isinstance(base, type) and issubclass(base, PreTrainedModel):
            return sliced_encoder_class(base)
    raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
