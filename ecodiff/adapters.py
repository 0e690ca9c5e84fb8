"""How diffusers builds its layers: one adapter a family of attention, feed-forward or ResNet.

An adapter gets a module and yields the groups that it recognises, by the module's structure and not by
the name of its model. This is the only place in ecodiff that knows an architecture; a new one is a new
function here and a row in tests/test_conformance.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise

from torch import nn

from .units import Attribute, PruneGroup, Slot, units

# Attention by the names of its Linears, of image and of text: those that give queries (and gates on
# the output, as wide), keys and values; those that give several of them at once, stacked; and those
# that read the heads' outputs.
QUERIES = ("to_q", "add_q_proj", "to_q_t", "to_query", "to_gate", "q_img")
KEYS_AND_VALUES = (
    *("to_k", "to_v", "add_k_proj", "add_v_proj", "to_k_t", "to_v_t", "to_key", "to_value"),
    *("k_img", "v_img"),
)
STACKED = {"img_qkv_proj": 3, "txt_kv_proj": 2, "img_attn_qkv": 3, "txt_attn_qkv": 3}  # PRX, JoyImage
OUTPUTS = ("to_out", "to_add_out", "to_out_t", "out_layer", "img_attn_proj", "txt_attn_proj")
QUERY_NORMS = ("norm_q", "norm_added_q", "q_rms_norm", "q_rms_norm_t")
KEY_NORMS = ("norm_k", "norm_added_k", "k_rms_norm", "k_rms_norm_t")
HEAD_COUNTS = ("heads", "num_heads")
# Heads that are left alone: AnyFlow's cache of frames has as many of them as its config says.
NOT_HEADS = ("AnyFlowCausal",)


def attention(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Heads of an attention with output Linears of its own."""
    outputs = _linears(module, OUTPUTS)
    if outputs and not _processor(module).startswith("LuminaAttn"):  # two share one: summed_attentions
        yield from _heads(path, module, [f"{path}.{name}" for name in outputs], min(outputs.values()))


def _linears(module: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Those of `names` that are Linears (or lists that begin with one), and what they read."""
    found = {}
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.ModuleList) and len(child):
            name, child = f"{name}.0", child[0]
        if isinstance(child, nn.Linear):
            found[name] = child.in_features
    return found


def _heads(path: str, module: nn.Module, consumers: list[str], width: int) -> Iterator[PruneGroup]:
    """Heads of an attention whose output is the first `width` columns that `consumers` read."""
    heads = next((getattr(module, name) for name in HEAD_COUNTS if hasattr(module, name)), 0)
    if not isinstance(heads, int) or heads < 1 or width % heads or _fused(module):
        return
    if _processor(module).startswith(NOT_HEADS):
        return
    stacked = _linears(module, STACKED)
    queries, keys = _linears(module, QUERIES), _linears(module, KEYS_AND_VALUES)
    rows = {name: getattr(module, name).out_features for name in (*queries, *keys, *stacked)}
    kv_width = min((rows[name] for name in keys), default=width)
    if not (stacked or (queries and keys)) or width % kv_width or kv_width % (width // heads):
        return
    if any(rows[n] != width for n in queries) or any(rows[n] != kv_width for n in keys):
        return
    if any(rows[name] != STACKED[name] * width for name in stacked):
        return
    # Grouped-query attention: a unit is a key-value head with the query heads that read it.
    head, size = width // heads, kv_width * heads // width
    each = heads // size
    q_index, kv_index = units(size, each * head), units(size, head)
    norms = [*_norms(path, module, QUERY_NORMS, head, q_index)]
    norms += _norms(path, module, KEY_NORMS, head, kv_index)
    if None in norms:
        return
    producers = [Slot(f"{path}.{name}", "out", q_index) for name in queries]
    producers += [Slot(f"{path}.{name}", "out", kv_index) for name in keys]
    producers += [Slot(f"{path}.{n}", "out", units(heads, head, STACKED[n])) for n in stacked]
    if isinstance(getattr(module, "to_gate_logits", None), nn.Linear):  # LTX-2: a gate a head
        producers.append(Slot(f"{path}.to_gate_logits", "out", units(heads)))
    if getattr(module, "history_scale_mode", "") == "per_head":  # Helios
        producers.append(Slot(path, "out", units(heads), bare=("history_key_scale", 0)))
    per_unit = {"heads": each, "num_heads": each, "sliceable_head_dim": each, "num_kv_heads": 1}
    per_unit |= {"inner_dim": each * head, "inner_kv_dim": head, "kv_inner_dim": head}
    if _processor(module).startswith(("OmniGen", "CosmosAttnProcessor2_5")):
        per_unit["out_dim"] = each * head
    yield PruneGroup(
        name=path,
        kind="heads",
        size=size,
        consumers=tuple(Slot(name, "in", q_index) for name in consumers),
        producers=tuple(producers),
        attributes=tuple(
            Attribute(path, n, value)
            for n, value in per_unit.items()
            if getattr(module, n, 0) == size * value
        ),
        norms=tuple(norms),
        rope_by_head=type(module).__name__.startswith(("LTXAttention", "LTX2Attention", "MochiAttention")),
    )


def _processor(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _fused(module: nn.Module) -> bool:
    return bool(getattr(module, "fused_projections", False))


def _norms(path: str, module: nn.Module, names: Iterable[str], head: int, index) -> Iterator[Slot | None]:
    """Norms of queries or keys that run across heads; None for one that ecodiff cannot follow."""
    for name in names:
        norm = getattr(module, name, None)
        weight = getattr(norm, "weight", None)
        shape = getattr(norm, "normalized_shape", getattr(norm, "dim", None))  # diffusers' RMSNorm: dim
        wide = shape[-1] if isinstance(shape, tuple) and shape else head
        if norm is None or (wide if weight is None else weight.numel()) == head:
            continue  # a head at a time: the same weights for all
        follows = type(norm) is nn.LayerNorm or (
            "RMS" in type(norm).__name__ and getattr(norm, "bias", None) is None
        )
        fits = weight is not None and weight.numel() == index.numel()
        yield Slot(f"{path}.{name}", "out", index) if follows and fits else None


def summed_attentions(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Lumina-Next: one Linear reads the sum of two attentions' heads, of which one is scaled by head."""
    first, second, scale = (getattr(module, name, None) for name in ("attn1", "attn2", "gate"))
    if not _processor(first).startswith("LuminaAttn") or not isinstance(scale, nn.Parameter):
        return
    width = second.to_out[0].in_features
    out = [f"{path}.attn2.to_out.0"]
    pair = [g for n, m in (("attn1", first), ("attn2", second)) for g in _heads(f"{path}.{n}", m, out, width)]
    if len(pair) != 2 or pair[0].size != pair[1].size:
        return
    gate = Slot(path, "out", units(pair[0].size, len(scale) // pair[0].size), bare=("gate", 0))
    yield replace(
        pair[1],
        producers=(*pair[0].producers, *pair[1].producers, gate),
        norms=pair[0].norms + pair[1].norms,
        attributes=pair[0].attributes + pair[1].attributes,
        least=1,
    )


def feed_forward(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Neurons of diffusers' FeedForward: net[0].proj in (twice as wide if gated), net[2] out."""
    net = getattr(module, "net", None)
    if not isinstance(net, nn.ModuleList) or len(net) < 3:
        return
    proj, out = getattr(net[0], "proj", None), net[2]
    if not isinstance(proj, nn.Linear) or not isinstance(out, nn.Linear):
        return
    hidden = out.in_features
    if proj.out_features not in (hidden, 2 * hidden):
        return
    yield PruneGroup(
        name=path,
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.net.2", "in", units(hidden)),),
        producers=(Slot(f"{path}.net.0.proj", "out", units(hidden, copies=proj.out_features // hidden)),),
    )


# Feed-forwards by the names of their Linears: those that read the input, and the one that is read last.
FEED_FORWARDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("w1", "w3"), "w2"),  # Z-Image, HiDream
    (("linear_1", "linear_3"), "linear_2"),  # Lumina 2
    (("linear_1", "linear_2"), "out_projection"),  # AuraFlow
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_proj", "up_proj"), "linear_fc2"),  # ERNIE-Image
    (("gate_up_proj",), "down_proj"),  # OmniGen
    (("gate", "up"), "down"),  # Krea 2
    (("linear_in",), "linear_out"),  # FLUX.2
    (("in_layer",), "out_layer"),  # Kandinsky 5
    (("gate_layer", "proj"), "out"),  # Qwen-Image 2.1
)


def named_feed_forward(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Neurons of gated feed-forwards that are no FeedForward of diffusers', known by their names."""
    for names, last in FEED_FORWARDS:
        linears = [getattr(module, name, None) for name in (*names, last)]
        if not all(isinstance(linear, nn.Linear) for linear in linears):
            continue
        hidden = linears[-1].in_features
        copies = {linear.out_features / hidden for linear in linears[:-1]}
        if copies in ({1.0}, {2.0}):
            index = units(hidden, copies=int(copies.pop()))
            producers = tuple(Slot(f"{path}.{name}", "out", index) for name in names)
            yield PruneGroup(path, "ffn", hidden, (Slot(f"{path}.{last}", "in", units(hidden)),), producers)
            return


def packed_experts(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Neurons of Nucleus-Image's experts, whose weights lie in one tensor: the same of every expert.

    gate_up_proj is (experts, width, 2 * neurons), down_proj (experts, neurons, width).
    """
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or up.ndim != 3:
        return
    hidden = down.shape[1]
    if up.shape[2] != 2 * hidden:
        return
    yield PruneGroup(
        name=path,
        kind="ffn",
        size=hidden,
        consumers=(Slot(path, "in", units(hidden), bare=("down_proj", 1)),),
        producers=(Slot(path, "out", units(hidden, copies=2), bare=("gate_up_proj", 2)),),
        attributes=(Attribute(path, "moe_intermediate_dim", 1),),
    )


def gated_convolutions(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Channels of Sana's GLUMBConv: inverted (value and gate), depthwise, and pointwise convolutions."""
    names = ("conv_inverted", "conv_depth", "conv_point")
    if not all(isinstance(getattr(module, name, None), nn.Conv2d) for name in names):
        return
    hidden = module.conv_point.in_channels
    if not module.conv_inverted.out_channels == module.conv_depth.groups == 2 * hidden:
        return
    index = units(hidden, copies=2)
    yield PruneGroup(
        name=path,
        kind="conv_ffn",
        size=hidden,
        consumers=(Slot(f"{path}.conv_point", "in", units(hidden)),),
        producers=tuple(Slot(f"{path}.{name}", "out", index) for name in names[:2]),
        attributes=(Attribute(f"{path}.conv_depth", "groups", 2),),
    )


def pointwise_convolutions(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Channels of Kandinsky 3's feed-forwards: two 1x1 convolutions and what is between them."""
    if not path.endswith(".feed_forward") or not isinstance(module, nn.Sequential) or len(module) != 3:
        return
    first, _, last = module
    if not isinstance(first, nn.Conv2d) or not isinstance(last, nn.Conv2d):
        return
    index = units(last.in_channels)
    consumers, producers = Slot(f"{path}.2", "in", index), Slot(f"{path}.0", "out", index)
    yield PruneGroup(path, "conv_ffn", last.in_channels, (consumers,), (producers,))


def parallel_attention(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """FLUX.2's single blocks: one Linear gives q, k, v and the gated MLP, another reads both."""
    fused, out = getattr(module, "to_qkv_mlp_proj", None), getattr(module, "to_out", None)
    if not isinstance(fused, nn.Linear) or not isinstance(out, nn.Linear):
        return
    heads, inner, hidden = module.heads, module.inner_dim, module.mlp_hidden_dim
    copies = module.mlp_mult_factor
    if not heads or fused.out_features != 3 * inner + copies * hidden or out.in_features != inner + hidden:
        return
    yield PruneGroup(
        name=path,
        kind="heads",
        size=heads,
        consumers=(Slot(f"{path}.to_out", "in", units(heads, inner // heads)),),
        producers=(Slot(f"{path}.to_qkv_mlp_proj", "out", units(heads, inner // heads, copies=3)),),
        attributes=(Attribute(path, "heads", 1), Attribute(path, "inner_dim", inner // heads)),
    )
    yield PruneGroup(
        name=f"{path}.mlp",
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.to_out", "in", units(hidden) + inner),),
        producers=(Slot(f"{path}.to_qkv_mlp_proj", "out", units(hidden, copies=copies) + 3 * inner),),
        attributes=(Attribute(path, "mlp_hidden_dim", 1),),
    )


def single_stream(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """FLUX's single blocks: proj_out reads the attention and the MLP (gated, in Ovis) side by side."""
    attn, mlp, out = (getattr(module, name, None) for name in ("attn", "proj_mlp", "proj_out"))
    if attn is None or not isinstance(mlp, nn.Linear) or not isinstance(out, nn.Linear):
        return
    inner = getattr(getattr(attn, "to_q", None), "out_features", 0)
    hidden = out.in_features - inner
    if not inner or mlp.out_features not in (hidden, 2 * hidden):
        return
    yield from _heads(f"{path}.attn", attn, [f"{path}.proj_out"], inner)
    yield PruneGroup(
        name=f"{path}.proj_mlp",
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.proj_out", "in", units(hidden) + inner),),
        producers=(Slot(f"{path}.proj_mlp", "out", units(hidden, copies=mlp.out_features // hidden)),),
        attributes=(Attribute(path, "mlp_hidden_dim", 1),) if hasattr(module, "mlp_hidden_dim") else (),
    )


def modulation(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Rows of the Linear that turns the time embedding into shifts, scales and gates; zero if gone.

    In the AdaLayerNormZero family, and in Qwen-Image's sequences of an activation and a Linear.
    """
    name, linear = "linear", getattr(module, "linear", None)
    if path.endswith(("img_mod", "txt_mod")) and isinstance(module, nn.Sequential):
        name, linear = str(len(module) - 1), module[-1]
    elif "AdaLayerNormZero" not in type(module).__name__:
        return
    if not isinstance(linear, nn.Linear):
        return
    slot = Slot(f"{path}.{name}", "out", units(linear.out_features), scattered=True)
    yield PruneGroup(path, "modulation", linear.out_features, consumers=(slot,), producers=())


def resnet(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Inner channels of diffusers' ResnetBlock2D, by groups of norm2: conv1 in, conv2 out.

    A group norm treats its groups apart, so removing whole ones leaves the others as they were.
    DreamLite's convolutions are two each, of which the second one's first goes channel by channel.
    """
    parts = dict(module.named_children())
    for name in ("conv1", "conv2"):
        for half in ("depthwise", "pointwise"):
            if hasattr(parts.get(name), half):
                parts[f"{name}.{half}"] = getattr(parts[name], half)
    first, last = (
        f"{name}.pointwise" if f"{name}.pointwise" in parts else name for name in ("conv1", "conv2")
    )
    conv1, norm, conv2, time = (parts.get(name) for name in (first, "norm2", last, "time_emb_proj"))
    if (
        not isinstance(conv1, (nn.Conv2d, nn.Conv3d))
        or not isinstance(conv2, (nn.Conv2d, nn.Conv3d))
        or not isinstance(norm, nn.GroupNorm)
    ):
        return
    channels, count = norm.num_channels, norm.num_groups
    if not conv1.out_channels == channels == conv2.in_channels or not conv1.groups == conv2.groups == 1:
        return
    width = channels // count
    index = units(count, width)
    producers = [Slot(f"{path}.{first}", "out", index), Slot(f"{path}.norm2", "out", index)]
    counts = [Attribute(f"{path}.norm2", "num_groups", 1), Attribute(f"{path}.norm2", "num_channels", width)]
    if "conv2.depthwise" in parts:
        producers.append(Slot(f"{path}.conv2.depthwise", "out", index))
        counts.append(Attribute(f"{path}.conv2.depthwise", "groups", width))
    if isinstance(time, nn.Linear):
        if time.out_features not in (channels, 2 * channels):
            return
        copies = time.out_features // channels  # two: scale and shift
        producers.append(Slot(f"{path}.time_emb_proj", "out", units(count, width, copies)))
    consumers = (Slot(f"{path}.{last}", "in", index),)
    yield PruneGroup(path, "resnet", count, consumers, tuple(producers), tuple(counts))


def bottleneck(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Inner channels of Kandinsky 3's ResNets: between two of their convolutions where the size stays."""
    steps = getattr(module, "resnet_blocks", None)
    if not isinstance(steps, nn.ModuleList):
        return
    for i, (first, then) in enumerate(pairwise(steps)):
        norm = getattr(getattr(then, "group_norm", None), "norm", None)
        resized = (getattr(first, "down_sample", None), getattr(then, "up_sample", None))
        if i % 2 or not isinstance(norm, nn.GroupNorm) or any(type(p) is not nn.Identity for p in resized):
            continue  # the odd ones' convolutions are cut on their other side already
        channels, count = norm.num_channels, norm.num_groups
        index, place = units(count, channels // count), f"{path}.resnet_blocks"
        modulated = units(count, channels // count, copies=2)  # scale and shift
        yield PruneGroup(
            name=f"{place}.{i}",
            kind="resnet",
            size=count,
            consumers=(Slot(f"{place}.{i + 1}.projection", "in", index),),
            producers=(
                Slot(f"{place}.{i}.projection", "out", index),
                Slot(f"{place}.{i + 1}.group_norm.context_mlp.1", "out", modulated),
            ),
            attributes=(
                Attribute(f"{place}.{i + 1}.group_norm.norm", "num_groups", 1),
                Attribute(f"{place}.{i + 1}.group_norm.norm", "num_channels", channels // count),
            ),
        )


ADAPTERS: tuple[Callable[[str, nn.Module], Iterator[PruneGroup]], ...] = (
    attention,
    summed_attentions,
    feed_forward,
    named_feed_forward,
    packed_experts,
    gated_convolutions,
    pointwise_convolutions,
    single_stream,
    parallel_attention,
    resnet,
    bottleneck,
    modulation,
)
