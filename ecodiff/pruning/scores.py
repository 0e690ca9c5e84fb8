"""Scores rank all units of a denoiser, and are cut into a plan of any size in milliseconds."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures import find_groups, unit_parameters
from ..errors import BudgetError, CheckpointError
from ..storage import read_tensors, write_tensors
from ..units import ALL_KINDS, KINDS, PRESET_KINDS, Kind, PruneGroup, in_words
from . import cutting
from .plan import PARTS, PrunePlan

SCORES_FORMAT = "ecodiff.scores.2"

_ABOUT = ("kinds", "costs", "total", "metadata", "macs", "total_macs", "itemsize")
_LATER = ("floors", "setups", "inside")  # files from before there were any have none


@dataclass
class Scores:
    """A ranking of all units: the higher, the longer a unit stays.

    Attributes:
        values: float32 (group.size,) a group: what a unit is worth per parameter that it holds,
            comparable across groups.
        kinds: one of `units.ALL_KINDS`, by group.
        costs: parameters that go with one unit, by group.
        total: parameters of the dense denoiser.
        metadata: JSON-able facts: model, method, what was spent.
        macs: multiply-accumulates of one unit in one denoiser call, by group (`measure.unit_macs`);
            empty: not measured.
        total_macs: of the dense denoiser's call.
        itemsize: bytes of a parameter, in memory.
        floors: the least number of units that must stay, of groups that cannot do without.
        setups: (parameters, MACs) that are added to a group as soon as one of its units goes.
        bases: of groups of directions: {group: (Z, Y)}, float32, each (units, units), or of directions inside
            heads (units, width) and (width, units); see `PrunePlan`.
        inside: of groups of directions inside heads, the group of those heads, whose units hold theirs.
    """

    values: dict[str, Tensor]
    kinds: dict[str, str]
    costs: dict[str, int]
    total: int
    metadata: dict = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    total_macs: int = 0
    itemsize: int = 4
    floors: dict[str, int] = field(default_factory=dict)
    setups: dict[str, list[int]] = field(default_factory=dict)
    bases: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        denoiser: nn.Module,
        values: Mapping[str, Tensor],
        macs: tuple[dict[str, int], int] | None = None,
        bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        **metadata,
    ) -> "Scores":
        """Scores of `denoiser`'s groups, with what their units cost; of modulation, rows or directions."""
        groups = [group for group in find_groups(denoiser, ALL_KINDS) if group.name in values]
        if any(group.activations for group in groups):
            groups = [group for group in groups if group.kind != "modulation"]
        by_unit, total_macs = macs or ({}, 0)
        return cls(
            values={g.name: values[g.name].detach().float().cpu() for g in groups},
            kinds={g.name: g.kind for g in groups},
            costs={g.name: unit_parameters(denoiser, g) for g in groups},
            total=sum(p.numel() for p in denoiser.parameters()),
            metadata=dict(metadata),
            macs={g.name: by_unit[g.name] for g in groups if g.name in by_unit},
            total_macs=total_macs,
            itemsize=next(denoiser.parameters()).element_size(),
            floors={g.name: g.floor for g in groups if g.floor},
            setups={g.name: [g.setup, _setup_macs(denoiser, g, by_unit)] for g in groups if g.setup},
            bases={n: (z.float().cpu(), y.float().cpu()) for n, (z, y) in (bases or {}).items()},
            inside={g.name: g.inside for g in groups if g.inside in values},
        )

    @classmethod
    def unranked(cls, denoiser: nn.Module, kinds: Iterable[Kind] = PRESET_KINDS) -> "Scores":
        """All units alike: what they cost, and how much can be removed at most."""
        return cls.of(
            denoiser, {group.name: torch.zeros(group.size) for group in find_groups(denoiser, kinds)}
        )

    @property
    def ceiling(self) -> float:
        """The largest ratio that can be asked for: the share of parameters that units hold."""
        return self.removable / self.total

    @property
    def removable(self) -> int:
        """Parameters that go if every unit goes that may."""
        return int(cutting.removable(self, self.costs))

    def setup(self, name: str, costs: Mapping[str, float]) -> int:
        """What is added to a group as soon as one of its units goes, in the unit of `costs`."""
        parameters, macs = self.setups.get(name, (0, 0))
        return parameters if costs is self.costs else macs if costs is self.macs else 0

    def floor(self, name: str) -> int:
        """The least number of units of a group that must stay."""
        return max(KINDS[self.kinds[name]].floor, self.floors.get(name, 0))

    def removed(self, plan: Mapping[str, Tensor], costs: Mapping[str, int] | None = None) -> int:
        """Parameters that `plan` removes (or what else `costs` counts)."""
        costs = self.costs if costs is None else costs
        gone = {name: int((~keep & ~cutting.within(self, plan, name)).sum()) for name, keep in plan.items()}
        return sum(costs[name] * n - self.setup(name, costs) for name, n in gone.items() if n)

    def plan(
        self,
        ratio: float | None = None,
        *,
        params: int | None = None,
        macs: int | None = None,
        bytes: int | None = None,
        latency_ms: float | None = None,
        units: Mapping[str, float] | None = None,
        measured: Callable[[PrunePlan], float] | None = None,
        align: bool | int = True,
        costs: tuple[Mapping[str, float], float] | None = None,
    ) -> PrunePlan:
        """Cut the ranking at a size, given in one of these ways.

        Args:
            ratio: fraction of the denoiser's parameters to remove.
            params: parameters that the pruned denoiser may have.
            macs: multiply-accumulates that one call of it may take.
            bytes: bytes that its weights may take in memory.
            latency_ms: milliseconds that one call may take, as `measured(plan)` tells: the largest
                plan within it, by bisection over the ratio.
            units: of each kind, the fraction of its units to remove, as EcoDiff's authors give sizes:
                {"heads": 0.32, "ffn": 0.12}. Other kinds stay whole, and widths are not aligned.
            align: remove FFN neurons in blocks, so that the widths that remain are multiples of 64
                where a layer has at least 1024 neurons, else of 8: what matrix units like. A number is
                taken in place of 64: 128 for kernels of 4-bit weights, 256 for GGUF's K-quants.
            costs: what `ratio` counts, of one unit by group and in all; None: parameters.

        Raises:
            BudgetError: out of range; the message names the model's ceiling.
        """
        given: dict[str, Any] = {"ratio": ratio, "params": params, "macs": macs, "bytes": bytes}
        given |= {"latency_ms": latency_ms, "units": units}
        if not 0 <= align <= 1024:
            raise BudgetError(f"Widths are multiples of 1 to 1024, not of {align}.")
        if sum(size is not None for size in given.values()) != 1:
            raise BudgetError(f"Give one size, one of: {', '.join(given)}.")
        if latency_ms is not None:
            return cutting.fastest(self, latency_ms, measured, align)
        if units is not None:
            return cutting.planned(self, cutting.kept_by_kind(self, units))
        if macs is not None:
            return self._cut(1 - macs / max(1, self.total_macs), self.macs, self.total_macs, "MACs", align)
        if params is not None:
            ratio = 1 - params / self.total
        elif bytes is not None:
            ratio = 1 - bytes / (self.total * self.itemsize)
        assert ratio is not None
        if costs is not None:
            return self._cut(ratio, *costs, "cost", align)
        return self._cut(ratio, self.costs, self.total, "parameters", align)

    def _cut(
        self, ratio: float, costs: Mapping[str, float], total: float, unit: str, align: bool | int | int
    ) -> PrunePlan:
        """Remove units, cheapest worth per `costs` first, until `ratio` of `total` is gone."""
        if not total or set(costs) != set(self.values):
            raise BudgetError(f"These scores do not know the {unit} of a unit (see measure.unit_macs).")
        ceiling = cutting.removable(self, costs) / total
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise BudgetError(
                f"The ratio is the fraction of {unit} to remove, from 0 to {ceiling:.3f} for this "
                f"model; {ratio!r} is not."
            )
        if ratio > ceiling:
            raise BudgetError(
                f"At most {ceiling:.1%} of this model's {unit} can be removed: the rest is not in "
                f"{self.kinds_in_words}. {ratio:.1%} is too much."
            )
        return cutting.planned(self, cutting.kept(self, costs, ratio * total, align))

    @property
    def kinds_in_words(self) -> str:
        """For example "heads or FFN neurons"."""
        return in_words(self.kinds.values())

    def save(self, path: str | Path) -> Path:
        """Write the scores: safetensors, float32, costs and metadata in the header."""
        header = {
            "format": SCORES_FORMAT,
            "about": json.dumps({name: getattr(self, name) for name in (*_ABOUT, *_LATER)}),
        }
        tensors = {n: v.contiguous() for n, v in self.values.items()}
        for name, pair in self.bases.items():
            tensors |= {f"{name}.{part}": m.flatten() for part, m in zip(PARTS, pair, strict=True)}
        return write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores. Raises CheckpointError if the file is not what `save` writes."""
        header, values = read_tensors(path, SCORES_FORMAT, torch.float32)
        try:
            about = json.loads(header["about"])
            bases: dict[str, Any] = {}
            for name in [n for n in about["kinds"] if f"{n}.{PARTS[0]}" in values]:
                size = len(values[name])
                z, y = (values.pop(f"{name}.{part}") for part in PARTS)
                bases[name] = z.view(size, -1), y.view(-1, size)
            _check(about, values)
            ordered = {name: values[name] for name in about["kinds"]}
            facts = {name: about[name] for name in (*_ABOUT, *_LATER) if name in about}
            return cls(ordered, **facts, bases=bases)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a valid scores file: {error}") from None


def _setup_macs(denoiser: nn.Module, group: PruneGroup, by_unit: Mapping[str, int]) -> int:
    """MACs of a projection of full rank: each consumer makes it, on the rows that it reads."""
    once, features = len(group.consumers) * group.size, unit_parameters(denoiser, group) - group.size
    return group.size * by_unit.get(group.name, 0) * once // (features + once)


def _check(about: dict, values: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a file's header fits its tensors: it may be a stranger's."""

    def whole(number) -> bool:
        return type(number) is int and 0 <= number < 1 << 50

    for name in ("kinds", "costs"):
        if set(about[name]) != set(values):
            raise ValueError(f"its list of {name} does not match its contents")
    if not set(about["kinds"].values()) <= set(ALL_KINDS) or not isinstance(about["metadata"], dict):
        raise ValueError("it has kinds of units that do not exist")
    if set(about["macs"]) not in (set(), set(values)):
        raise ValueError("its list of MACs does not match its contents")
    floors = about.get("floors", {})
    if not all(whole(n) and n <= len(values.get(name, ())) for name, n in floors.items()):
        raise ValueError("its floors are not of its groups")
    setups = about.get("setups", {})
    if not all(name in values and len(pair) == 2 and all(map(whole, pair)) for name, pair in setups.items()):
        raise ValueError("its set-up costs are not of its groups")
    inside = {n: (len(values[n]), len(values[heads])) for n, heads in about.get("inside", {}).items()}
    if not all(heads and units % heads == 0 for units, heads in inside.values()):
        raise ValueError("its directions are not inside its heads")
    numbers = [*about["costs"].values(), *about["macs"].values(), about["total_macs"], about["itemsize"]]
    if not all(map(whole, numbers)) or not whole(about["total"]) or about["total"] == 0:
        raise ValueError("its costs are not whole numbers")
