"""Channels of convolutions: convolutional feed-forwards and ResNets."""

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from ..units import Attribute, PruneGroup, Slot, units
from .registry import Layer, adapter


@adapter
def gated_convolutions(path: str, module: Layer) -> Iterator[PruneGroup]:
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


@adapter
def pointwise_convolutions(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Channels of Kandinsky 3's feed-forwards: two 1x1 convolutions and what is between them."""
    if not path.endswith(".feed_forward") or not isinstance(module, nn.Sequential) or len(module) != 3:
        return
    first, _, last = module
    if not isinstance(first, nn.Conv2d) or not isinstance(last, nn.Conv2d):
        return
    index = units(last.in_channels)
    consumers, producers = Slot(f"{path}.2", "in", index), Slot(f"{path}.0", "out", index)
    yield PruneGroup(path, "conv_ffn", last.in_channels, (consumers,), (producers,))


@adapter
def resnet(path: str, module: Layer) -> Iterator[PruneGroup]:
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


@adapter
def bottleneck(path: str, module: Layer) -> Iterator[PruneGroup]:
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
