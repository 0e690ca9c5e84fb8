"""What a unit is: kinds, and the description of a group of units. Pure description, no weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Kind = str  # a name of KINDS


@dataclass(frozen=True)
class UnitKind:
    """One kind of unit.

    Attributes:
        name: as in files, options and the API.
        word: in the plural, for people.
        floor: the least number that must stay in a layer: norms and depthwise convolutions of no channels
            cannot run.
        aligned: widths that remain are rounded to what matrix units like.
        published: the paper prunes it.
        preset: all presets prune it; modulation buys memory, but no time.
    """

    name: Kind
    word: str
    floor: int = 0
    aligned: bool = False
    published: bool = False
    preset: bool = True


KINDS: dict[Kind, UnitKind] = {
    kind.name: kind
    for kind in (
        UnitKind("heads", "heads", published=True),
        UnitKind("ffn", "FFN neurons", aligned=True, published=True),
        UnitKind("conv_ffn", "FFN channels", floor=1, aligned=True, published=True),
        UnitKind("resnet", "ResNet channels", floor=1),
        UnitKind("modulation", "modulation rows", preset=False),
        UnitKind("modulation_directions", "modulation directions", floor=1, aligned=True, preset=False),
        UnitKind("value_directions", "directions inside heads", aligned=True, preset=False),
        UnitKind("query_directions", "directions of queries and keys", aligned=True, preset=False),
    )
}
ALL_KINDS: tuple[Kind, ...] = tuple(KINDS)
PUBLISHED_KINDS: tuple[Kind, ...] = tuple(name for name, kind in KINDS.items() if kind.published)
PRESET_KINDS: tuple[Kind, ...] = tuple(name for name, kind in KINDS.items() if kind.preset)


# The projection that AdaLN Linears share, in a denoiser that was cut to directions.
BASIS = "modulation_basis"


def in_words(kinds: Iterable[str]) -> str:
    """For example "heads or FFN neurons"."""
    wanted = set(kinds)
    return " or ".join(kind.word for name, kind in KINDS.items() if name in wanted)


@dataclass(frozen=True)
class Slot:
    """One axis of one Linear, convolution or norm, indexed by unit.

    `index` has shape (units, width): the rows (axis "out") or columns (axis "in") of each unit; of
    a convolution they are channels. Parameters that are no layer's weight (experts packed in one
    tensor, a scale a head) are named, with the dimension that the units lie along.
    """

    module: str
    axis: Literal["in", "out"]
    index: Tensor
    scattered: bool = False  # the output keeps its width; rows that are gone are zeros in it
    bare: tuple[str, int] | None = None

    @property
    def dim(self) -> int:
        """The dimension of the parameter that `index` is along."""
        return self.bare[1] if self.bare else int(self.axis == "in")

    def weight(self, denoiser: nn.Module) -> Any:
        """The parameter itself, a Tensor; None of a norm that has none."""
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
    bias_by_head: bool = False  # the heads of all layers share one table of position biases
    least: int = 0  # diffusers' code cannot do with fewer
    # Activations whose output all consumers read, and which is projected onto the directions that stay.
    activations: tuple[str, ...] = ()
    # Directions of what each unit of another group gives, or compares: its name, and how many a unit has.
    inside: str = ""
    width: int = 1

    @property
    def setup(self) -> int:
        """Parameters that are added as soon as one unit goes: those of a projection of full rank."""
        return self.size**2 if self.activations and not self.producers else 0

    @property
    def floor(self) -> int:
        """The least number of units that must stay."""
        return max(self.least, KINDS[self.kind].floor)

    @property
    def routed(self) -> bool:
        """Its tokens are chosen by a router, from all rows of a batch: no row of a mask is theirs alone."""
        return "experts" in self.name.split(".")

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.consumers + self.producers + self.norms


def units(count: int, width: int = 1, copies: int = 1) -> Tensor:
    """Index of `count` units of `width` adjacent features, in `copies` stacked blocks.

    Two copies are the value and gate halves of GEGLU. Shape (count, copies * width).
    """
    block = torch.arange(count * width).view(count, width)
    return torch.cat([block + copy * count * width for copy in range(copies)], dim=1)
