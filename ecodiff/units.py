"""What a unit is: kinds, and the description of a group of units. Pure description, no weights."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import LongTensor

Kind = Literal["heads", "ffn", "conv_ffn", "resnet", "modulation"]
ALL_KINDS: tuple[Kind, ...] = ("heads", "ffn", "conv_ffn", "resnet", "modulation")
KINDS: tuple[Kind, ...] = ("heads", "ffn", "conv_ffn")  # the paper's
PRESET_KINDS: tuple[Kind, ...] = (*KINDS, "resnet")  # modulation rows buy memory, but no time
WORDS: dict[Kind, str] = {
    "heads": "heads",
    "ffn": "FFN neurons",
    "conv_ffn": "FFN channels",
    "resnet": "ResNet channels",
    "modulation": "modulation rows",
}
# Norms and depthwise convolutions of no channels cannot run.
FLOORS: dict[Kind, int] = {"heads": 0, "ffn": 0, "conv_ffn": 1, "resnet": 1, "modulation": 0}


@dataclass(frozen=True)
class Slot:
    """One axis of one Linear, convolution or norm, indexed by unit.

    `index` has shape (units, width): the rows (axis "out") or columns (axis "in") of each unit; of
    a convolution they are channels.
    """

    module: str
    axis: Literal["in", "out"]
    index: LongTensor
    scattered: bool = False  # the output keeps its width; rows that are gone are zeros in it


@dataclass(frozen=True)
class Attribute:
    """An integer attribute of `module` that must be `per_unit` times the number of kept units."""

    module: str
    name: str
    per_unit: int


@dataclass(frozen=True)
class PruneGroup:
    """The units of one layer and the modules they run through. Pure description, no weights."""

    name: str
    kind: Kind
    size: int
    consumers: tuple[Slot, ...]  # where a mask is applied: to inputs, or to scattered outputs
    producers: tuple[Slot, ...]
    attributes: tuple[Attribute, ...] = ()
    norms: tuple[Slot, ...] = ()  # RMS norms across units: their mean runs over what the mask keeps
    rope_by_head: bool = False  # each head has rotary positions of its own

    @property
    def floor(self) -> int:
        """The least number of units that must stay."""
        return FLOORS[self.kind]

    @property
    def routed(self) -> bool:
        """Its tokens are chosen by a router, from all rows of a batch: no row of a mask is theirs alone."""
        return "experts" in self.name.split(".")

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.consumers + self.producers + self.norms


def units(count: int, width: int = 1, copies: int = 1) -> LongTensor:
    """Index of `count` units of `width` adjacent features, in `copies` stacked blocks.

    Two copies are the value and gate halves of GEGLU. Shape (count, copies * width).
    """
    block = torch.arange(count * width).view(count, width)
    return torch.cat([block + copy * count * width for copy in range(copies)], dim=1)
