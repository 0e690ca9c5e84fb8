"""AdaLN modulation: rows of its Linears, and directions of what all of them read."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from ..units import BASIS, PruneGroup, Slot, units
from .registry import Layer, adapter, whole

WORTH = 8  # a shared projection is offered where it is read by at least so many times its own size


@adapter
def modulation(path: str, module: Layer) -> Iterator[PruneGroup]:
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
    slot = Slot(f"{path}.{name}", "out", units(len(linear.weight)), scattered=True)
    yield PruneGroup(path, "modulation", len(linear.weight), consumers=(slot,), producers=())


def _readers(denoiser: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of the activations of the time embedding, and of the Linears that read them."""
    for path, module in denoiser.named_modules():
        layer: Layer = module
        if path.endswith(("img_mod", "txt_mod")) and isinstance(module, nn.Sequential) and len(module) == 2:
            names = ("0", "1")
        else:
            names = ("silu", "linear")
        activation, linear = (getattr(layer, name, None) for name in names)
        if (isinstance(activation, nn.SiLU) or hasattr(activation, "basis")) and isinstance(
            linear, nn.Linear
        ):
            yield f"{path}.{names[0]}", f"{path}.{names[1]}"


@whole
def directions(denoiser: Layer) -> Iterator[PruneGroup]:
    """Directions of the vector s = silu(temb) that all AdaLN Linears of a model read.

    W s = (W Y) (Z s) with any Z, Y of full rank, Y Z = 1: with one projection Z for all of them, a direction
    of s is an input feature of each. What is not kept of Z and of the columns of W Y is gone. A model whose
    modulation is small or is no layer of its own (FLUX.2, PixArt, Wan) has none.
    """
    found = list(_readers(denoiser))
    linears = {linear: denoiser.get_submodule(linear) for _, linear in found}
    sizes = Counter(layer.weight.shape[1] for layer in linears.values())
    for size, _ in sizes.most_common(1):
        read = [(a, n) for a, n in found if linears[n].weight.shape[1] == size]
        slots = tuple(Slot(name, "in", units(size)) for _, name in read)
        if sum(len(linears[name].weight) for _, name in read) < WORTH * size:
            return
        producers = (Slot(BASIS, "out", units(size)),) if hasattr(denoiser, BASIS) else ()
        activations = tuple(activation for activation, _ in read)
        yield PruneGroup(BASIS, "modulation_directions", size, slots, producers, activations=activations)
