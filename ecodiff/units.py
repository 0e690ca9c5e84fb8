"""What a unit is: kinds, and the description of a group of units. Pure description, no weights."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import LongTensor, Tensor, nn

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
    a convolution they are channels. Parameters that are no layer's weight (experts packed in one
    tensor, a scale a head) are named, with the dimension that the units lie along.
    """

    module: str
    axis: Literal["in", "out"]
    index: LongTensor
    scattered: bool = False  # the output keeps its width; rows that are gone are zeros in it
    bare: tuple[str, int] | None = None

    @property
    def dim(self) -> int:
        """The dimension of the parameter that `index` is along."""
        return self.bare[1] if self.bare else int(self.axis == "in")

    def weight(self, denoiser: nn.Module) -> Tensor | None:
        """The parameter itself; None of a norm that has none."""
        return getattr(denoiser.get_submodule(self.module), self.bare[0] if self.bare else "weight")

    def features(self, denoiser: nn.Module) -> int:
        """How many there are along `dim`, of all units and of none."""
        return self.weight(denoiser).shape[self.dim]


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
    norms: tuple[Slot, ...] = ()  # norms across units: their means run over what the mask keeps
    rope_by_head: bool = False  # each head has rotary positions of its own
    least: int = 0  # diffusers' code cannot do with fewer

    @property
    def floor(self) -> int:
        """The least number of units that must stay."""
        return max(self.least, FLOORS[self.kind])

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
