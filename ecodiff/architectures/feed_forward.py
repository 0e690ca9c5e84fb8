"""Feed-forward neurons."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..units import Attribute, PruneGroup, Slot, units
from .registry import Layer, adapter


@adapter
def feed_forward(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Neurons of diffusers' FeedForward: net[0].proj in (twice as wide if gated), net[2] out."""
    net = getattr(module, "net", None)
    if not isinstance(net, nn.ModuleList) or len(net) < 3:
        return
    proj, out = getattr(net[0], "proj", None), net[2]
    if not isinstance(proj, nn.Linear) or not isinstance(out, nn.Linear):
        return
    hidden = out.in_features
    if not hidden or proj.out_features not in (hidden, 2 * hidden):
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
    (("fc1",), "fc2"),  # CLIP
    (("wi_0", "wi_1"), "wo"),  # T5, version 1.1
    (("wi",), "wo"),  # T5
)


@adapter
def named_feed_forward(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Neurons of gated feed-forwards that are no FeedForward of diffusers', known by their names."""
    for names, last in FEED_FORWARDS:
        linears: list[Any] = [getattr(module, name, None) for name in (*names, last)]
        if not all(isinstance(linear, nn.Linear) for linear in linears):
            continue
        hidden = linears[-1].in_features
        if not hidden:  # it was emptied
            continue
        copies = {linear.out_features / hidden for linear in linears[:-1]}
        if copies in ({1.0}, {2.0}):
            index = units(hidden, copies=int(copies.pop()))
            producers = tuple(Slot(f"{path}.{name}", "out", index) for name in names)
            yield PruneGroup(path, "ffn", hidden, (Slot(f"{path}.{last}", "in", units(hidden)),), producers)
            return


@adapter
def packed_experts(path: str, module: Layer) -> Iterator[PruneGroup]:
    """Neurons of Nucleus-Image's experts, whose weights lie in one tensor: the same of every expert.

    gate_up_proj is (experts, width, 2 * neurons), down_proj (experts, neurons, width).
    """
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, nn.Parameter) or not isinstance(down, nn.Parameter) or up.ndim != 3:
        return
    hidden = down.shape[1]
    if not hidden or up.shape[2] != 2 * hidden:
        return
    yield PruneGroup(
        name=path,
        kind="ffn",
        size=hidden,
        consumers=(Slot(path, "in", units(hidden), bare=("down_proj", 1)),),
        producers=(Slot(path, "out", units(hidden, copies=2), bare=("gate_up_proj", 2)),),
        attributes=(Attribute(path, "moe_intermediate_dim", 1),),
    )
