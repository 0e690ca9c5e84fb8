"""What can be pruned: groups of units, found by the structure of the denoiser.

A unit is one attention head, one FFN neuron (or channel), or one norm group of a ResNet's inner
channels. Its group says through which Linears and convolutions it runs: the *producers* whose
output rows belong to the units, and the *consumers* whose input columns do. Multiplying a unit's
consumer input by zero is the same as deleting those rows and columns; gates, slicing and the cost
of a unit all follow from that one description, and nothing else in ecodiff knows an architecture.

Modulation rows (of the Linear that turns the time embedding into a block's shifts, scales and gates)
are units without a consumer: a row that is gone is read as zero (`Slot.scattered`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..checks import check_layers
from ..errors import UnsupportedModelError
from ..units import PUBLISHED_KINDS, Kind, PruneGroup, Slot, in_words

Layer = Any  # a module of any class: adapters look at its structure
# Denoisers whose forward counts heads by their config, so they must keep them all.
HEADS_OF_THE_CONFIG = ("PriorTransformer",)
Adapter = Callable[[str, Layer], Iterator[PruneGroup]]
ADAPTERS: list[Adapter] = []
WHOLE: list[Callable[[Layer], Iterator[PruneGroup]]] = []  # those that look at the whole denoiser


def adapter(function: Adapter) -> Adapter:
    """Register how one family of layers is recognised: gets a module and its path, yields its groups.

    By the module's structure and not by the name of its model. Modules of this package are imported by
    themselves, so a new family is one new file.
    """
    ADAPTERS.append(function)
    return function


def whole(function: Callable[[Layer], Iterator[PruneGroup]]) -> Callable[[Layer], Iterator[PruneGroup]]:
    """Register how units that run through the whole denoiser are recognised: gets it, yields its groups."""
    WHOLE.append(function)
    return function


def _repeated(denoiser: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules inside the repeated blocks (ModuleLists): embeddings and projectors are left alone."""
    lists: list[str] = []
    for path, module in denoiser.named_modules():
        if any(path.startswith(prefix) for prefix in lists):
            yield path, module
        if isinstance(module, nn.ModuleList):
            lists.append(path + ".")


def find_groups(denoiser: nn.Module, kinds: Iterable[Kind] = PUBLISHED_KINDS) -> list[PruneGroup]:
    """Every group of units that can be pruned from `denoiser`, in network order.

    Args:
        denoiser: `pipe.unet` or `pipe.transformer`, on any device (also "meta").
        kinds: which units to look for: "heads", "ffn" and "conv_ffn" are the paper's; "resnet" (inner
            channels of a UNet's ResNets), "modulation" (rows of AdaLN), "modulation_directions" (of
            what all AdaLN layers read), "value_directions" and "query_directions" (inside heads, of
            what they give and of what they compare) are not.

    Raises:
        UnsupportedModelError: nothing was recognised.

    Example:
        >>> groups = find_groups(pipe.unet)
        >>> sum(group.size for group in groups if group.kind == "heads")
        256
    """
    wanted = set(kinds)
    groups = [group for group in _all_groups(denoiser) if group.kind in wanted]
    if not groups:
        raise UnsupportedModelError(
            f"{type(denoiser).__name__} has no {in_words(wanted)} that ecodiff recognises. Supported: "
            "denoisers built of the layers of Stable Diffusion 1.5 to 3.5, FLUX and their like."
        )
    return groups


_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple, list[PruneGroup]]] = WeakKeyDictionary()


def _all_groups(denoiser: nn.Module) -> list[PruneGroup]:
    """Groups of every kind, found once for as long as the denoiser's layers stay what they are."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # under torch.compile's wrapper
    now = tuple(_identity(path, module) for path, module in denoiser.named_modules())
    before, groups = _FOUND.get(denoiser, (None, []))
    if now != before:
        check_layers(denoiser)
        groups = [g for path, m in _repeated(denoiser) for adapter in ADAPTERS for g in adapter(path, m)]
        groups += [group for adapter in WHOLE for group in adapter(denoiser)]
        groups = [group for group in groups if group.size]  # what was emptied has nothing left to give
        if type(denoiser).__name__.endswith(HEADS_OF_THE_CONFIG):
            groups = [group for group in groups if group.kind != "heads" and not group.inside]
        _FOUND[denoiser] = now, groups
    return groups


def _identity(path: str, module: nn.Module) -> tuple:
    """What adapters look at: a layer's class, processor, shapes and counts."""
    shapes = tuple(None if p is None else p.shape for p in module._parameters.values())
    counts = tuple(value for value in vars(module).values() if type(value) is int)
    processor = type(getattr(module, "processor", None))
    return path, type(module), shapes, counts, processor, getattr(module, "fused_projections", False)


def unrecognised(denoiser: nn.Module, groups: list[PruneGroup]) -> dict[str, int]:
    """Parameters that no group touches, by class of the layer that holds them, largest first."""
    touched = {slot.module for group in groups for slot in group.slots}
    counts: dict[str, int] = {}
    for path, module in denoiser.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        if own and path not in touched:
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + own
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def blocks(groups: Iterable[PruneGroup]) -> dict[str, list[str]]:
    """The paper's groups by the transformer block that they are in: {block: [group names]}.

    A block is what a ModuleList repeats. With all its groups gone, of its residual branches only
    the output biases remain.
    """
    found: dict[str, list[str]] = {}
    for group in groups:
        parts = group.name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        if group.kind in PUBLISHED_KINDS and last >= 0:
            found.setdefault(".".join(parts[: last + 1]), []).append(group.name)
    return {block: names for block, names in found.items() if len(names) > 1}


def unit_parameters(denoiser: nn.Module, group: PruneGroup) -> int:
    """Parameters that go with one unit: its producer rows (and biases) and consumer columns.

    Where they are added as soon as one goes (`PruneGroup.setup`), also those that go again.
    """
    return group.setup // max(1, group.size) + sum(
        slot.index.shape[1] * (_per_feature(denoiser, slot) + _bias_per_feature(denoiser, slot))
        for slot in group.slots
    )


def _per_feature(denoiser: nn.Module, slot: Slot) -> int:
    weight = slot.weight(denoiser)
    return 0 if weight is None else weight.numel() // weight.shape[slot.dim]


def _bias_per_feature(denoiser: nn.Module, slot: Slot) -> int:
    has_one = getattr(denoiser.get_submodule(slot.module), "bias", None) is not None
    return int(slot.axis == "out" and slot.bare is None and has_one)
