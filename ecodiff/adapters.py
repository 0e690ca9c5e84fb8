"""How diffusers builds its layers: one adapter a family of attention, feed-forward or ResNet.

An adapter gets a module and yields the groups that it recognises, by the module's structure and not by
the name of its model. This is the only place in ecodiff that knows an architecture; a new one is a new
function here and a row in tests/test_conformance.py.
"""

from collections.abc import Callable, Iterator

from torch import nn

from .units import Attribute, PruneGroup, Slot, units


def attention(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Heads of diffusers' attention layers: to_q, to_k, to_v in, to_out[0] (and to_add_out) out."""
    out = getattr(module, "to_out", None)
    if not isinstance(out, nn.ModuleList) or len(out) == 0 or not isinstance(out[0], nn.Linear):
        return
    consumers = [f"{path}.to_out.0"]
    if isinstance(getattr(module, "to_add_out", None), nn.Linear):
        consumers.append(f"{path}.to_add_out")
    yield from _heads(path, module, consumers, out[0].in_features)


def _heads(path: str, module: nn.Module, consumers: list[str], width: int) -> Iterator[PruneGroup]:
    """Heads of an attention whose output is the first `width` columns that `consumers` read."""
    if not all(isinstance(getattr(module, n, None), nn.Linear) for n in ("to_q", "to_k", "to_v")):
        return
    heads, inner = getattr(module, "heads", 0), module.to_q.out_features
    if not heads or inner % heads or inner != width:
        return
    norms = [getattr(getattr(module, name, None), "weight", None) for name in ("norm_q", "norm_k")]
    across_heads = heads > 1 and any(weight is not None and weight.numel() == inner for weight in norms)
    kv_inner = module.to_k.out_features
    if across_heads or inner % kv_inner or kv_inner % (inner // heads):
        return  # norms across heads need an adapter of their own
    # Grouped-query attention: a unit is a key-value head with the query heads that read it.
    size, width = kv_inner * heads // inner, inner // heads
    index = {"q": units(size, heads // size * width), "kv": units(size, width)}
    parts = {"to_q": "q", "to_k": "kv", "to_v": "kv"}
    parts |= {"add_q_proj": "q", "add_k_proj": "kv", "add_v_proj": "kv"}
    linears = {n: index[part] for n, part in parts.items() if isinstance(getattr(module, n, None), nn.Linear)}
    per_unit = {"heads": heads // size, "sliceable_head_dim": heads // size, "num_kv_heads": 1}
    per_unit |= {"inner_dim": heads // size * width, "inner_kv_dim": width}
    yield PruneGroup(
        name=path,
        kind="heads",
        size=size,
        consumers=tuple(Slot(name, "in", index["q"]) for name in consumers),
        producers=tuple(Slot(f"{path}.{name}", "out", rows) for name, rows in linears.items()),
        attributes=tuple(
            Attribute(path, name, value) for name, value in per_unit.items() if hasattr(module, name)
        ),
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
    """FLUX's single blocks: proj_out reads the attention and the MLP side by side."""
    attn, mlp, out = (getattr(module, name, None) for name in ("attn", "proj_mlp", "proj_out"))
    if attn is None or not isinstance(mlp, nn.Linear) or not isinstance(out, nn.Linear):
        return
    hidden, inner = mlp.out_features, out.in_features - mlp.out_features
    if inner != getattr(getattr(attn, "to_q", None), "out_features", None):
        return
    yield from _heads(f"{path}.attn", attn, [f"{path}.proj_out"], inner)
    yield PruneGroup(
        name=f"{path}.proj_mlp",
        kind="ffn",
        size=hidden,
        consumers=(Slot(f"{path}.proj_out", "in", units(hidden) + inner),),
        producers=(Slot(f"{path}.proj_mlp", "out", units(hidden)),),
        attributes=(Attribute(path, "mlp_hidden_dim", 1),) if hasattr(module, "mlp_hidden_dim") else (),
    )


def modulation(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Rows of the AdaLayerNormZero family: the Linear behind the time embedding, read as zero if gone."""
    linear = getattr(module, "linear", None)
    if not type(module).__name__.startswith("AdaLayerNormZero") or not isinstance(linear, nn.Linear):
        return
    slot = Slot(f"{path}.linear", "out", units(linear.out_features), scattered=True)
    yield PruneGroup(path, "modulation", linear.out_features, consumers=(slot,), producers=())


def resnet(path: str, module: nn.Module) -> Iterator[PruneGroup]:
    """Inner channels of diffusers' ResnetBlock2D, by groups of norm2: conv1 in, conv2 out.

    A group norm treats its groups apart, so removing whole ones leaves the others as they were.
    """
    conv1, norm, conv2 = (getattr(module, name, None) for name in ("conv1", "norm2", "conv2"))
    time = getattr(module, "time_emb_proj", None)
    if (
        not isinstance(conv1, nn.Conv2d)
        or not isinstance(conv2, nn.Conv2d)
        or not isinstance(norm, nn.GroupNorm)
    ):
        return
    channels, count = norm.num_channels, norm.num_groups
    if not conv1.out_channels == channels == conv2.in_channels or not conv1.groups == conv2.groups == 1:
        return
    index = units(count, channels // count)
    producers = [Slot(f"{path}.conv1", "out", index), Slot(f"{path}.norm2", "out", index)]
    if isinstance(time, nn.Linear):
        if time.out_features not in (channels, 2 * channels):
            return
        copies = time.out_features // channels  # two: scale and shift
        producers.append(Slot(f"{path}.time_emb_proj", "out", units(count, channels // count, copies)))
    yield PruneGroup(
        name=path,
        kind="resnet",
        size=count,
        consumers=(Slot(f"{path}.conv2", "in", index),),
        producers=tuple(producers),
        attributes=(
            Attribute(f"{path}.norm2", "num_groups", 1),
            Attribute(f"{path}.norm2", "num_channels", channels // count),
        ),
    )


ADAPTERS: tuple[Callable[[str, nn.Module], Iterator[PruneGroup]], ...] = (
    attention,
    feed_forward,
    named_feed_forward,
    gated_convolutions,
    single_stream,
    parallel_attention,
    resnet,
    modulation,
)
