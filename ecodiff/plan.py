"""Scores rank all units of a denoiser; a plan says which of them stay.

One run of learning gives one ranking, and a plan of any size is cut from it in milliseconds.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import BoolTensor, Tensor, nn

from .errors import BudgetError, CheckpointError, PlanError
from .groups import find_groups, unit_parameters

PLAN_FORMAT = "ecodiff.plan.1"
SCORES_FORMAT = "ecodiff.scores.1"
MAX_FILE_BYTES = 64 << 20  # FLUX.1 has 2 M units: 4 MB of scores, 250 kB of plan
MAX_UNITS = 1 << 20  # in one group
_GROUP_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")


class PrunePlan(Mapping[str, BoolTensor]):
    """Which units stay: {group name: bool (group.size,)}. A group that is not named is kept whole.

    Args:
        keep: one bool tensor a group, True where the unit stays.
        metadata: JSON-able facts that travel in the file: model, ratio, method.

    Example:
        >>> plan = PrunePlan({group.name: torch.rand(group.size) > 0.2 for group in groups})
        >>> plan.save("mine.safetensors")
    """

    def __init__(self, keep: Mapping[str, Tensor], metadata: Mapping | None = None):
        self._keep: dict[str, BoolTensor] = {}
        for name, mask in keep.items():
            mask = torch.as_tensor(mask)
            if mask.dtype != torch.bool or mask.ndim != 1:
                raise PlanError(
                    f"The plan of {name} must be a bool tensor of shape (units,), "
                    f"not {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}."
                )
            self._keep[name] = mask.cpu()
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> BoolTensor:
        return self._keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def __repr__(self) -> str:
        kept, total = sum(int(k.sum()) for k in self.values()), sum(len(k) for k in self.values())
        return f"PrunePlan({kept} of {total} units in {len(self)} groups, {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """SHA-256 of what is kept (not of the metadata): the same cut has the same digest."""
        packed = json.dumps(self.packed(), sort_keys=True)
        return hashlib.sha256(packed.encode()).hexdigest()

    def packed(self) -> dict[str, list]:
        """JSON form: {group name: [size, base64 of the bits]}."""
        bits = {name: np.packbits(keep.numpy()).tobytes() for name, keep in self.items()}
        return {n: [len(self[n]), base64.b64encode(b).decode()] for n, b in bits.items()}

    @classmethod
    def unpacked(cls, packed: Mapping[str, list], metadata: Mapping | None = None) -> "PrunePlan":
        """The inverse of `packed`. Raises PlanError if it is not well formed."""
        keep = {}
        for name, (size, text) in packed.items():
            keep[name] = _unpack_bits(name, size, np.frombuffer(base64.b64decode(text), np.uint8))
        return cls(keep, metadata)

    def check(self, denoiser: nn.Module) -> None:
        """Raise PlanError unless every group is one of `denoiser`'s, with the same units."""
        sizes = {group.name: group.size for group in find_groups(denoiser)}
        for name, keep in self.items():
            if sizes.get(name) != len(keep):
                what = f"{sizes[name]} units" if name in sizes else "no such group"
                raise PlanError(
                    f"This plan does not fit the model: it has {len(keep)} units in {name}, "
                    f"and the {type(denoiser).__name__} has {what} there. Use the model that it "
                    f"was made for{self._made_for()}."
                )

    def _made_for(self) -> str:
        return f" ({self.metadata['model']})" if self.metadata.get("model") else ""

    def save(self, path: str | Path) -> Path:
        """Write the plan: safetensors, one bit-packed uint8 tensor a group. Returns the path."""
        tensors = {n: torch.from_numpy(np.packbits(keep.numpy())) for n, keep in self.items()}
        sizes = {name: len(keep) for name, keep in self.items()}
        header = {
            "format": PLAN_FORMAT,
            "sizes": json.dumps(sizes),
            "metadata": json.dumps(self.metadata),
        }
        return _write(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "PrunePlan":
        """Read a plan file.

        Raises:
            CheckpointError: not a plan, truncated, too large, or of a newer format.
        """
        header, tensors = _read(path, PLAN_FORMAT, torch.uint8)
        try:
            sizes, metadata = json.loads(header["sizes"]), json.loads(header["metadata"])
            if set(sizes) != set(tensors) or not isinstance(metadata, dict):
                raise PlanError("its list of groups does not match its contents")
            keep = {n: _unpack_bits(n, sizes[n], tensors[n].numpy()) for n in sorted(sizes)}
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a valid plan file: {error}") from None
        return cls(keep, metadata)


def _unpack_bits(name: str, size: int, packed: np.ndarray) -> BoolTensor:
    if not _GROUP_NAME.fullmatch(name) or type(size) is not int or not 0 < size <= MAX_UNITS:
        raise PlanError(f"{name!r} with {size!r} units is not a group of a model.")
    if packed.shape != (-(-size // 8),):
        raise PlanError(f"{name} has {packed.size} bytes for {size} units.")
    return torch.from_numpy(np.unpackbits(packed, count=size).astype(bool))


@dataclass
class Scores:
    """A ranking of all units: the higher, the longer a unit stays.

    Attributes:
        values: float32 (group.size,) a group; comparable across groups.
        kinds: "heads" or "ffn", by group.
        costs: parameters that go with one unit, by group.
        total: parameters of the dense denoiser.
        metadata: JSON-able facts: model, method, what was spent.
    """

    values: dict[str, Tensor]
    kinds: dict[str, str]
    costs: dict[str, int]
    total: int
    metadata: dict = field(default_factory=dict)

    @classmethod
    def of(cls, denoiser: nn.Module, values: Mapping[str, Tensor], **metadata) -> "Scores":
        """Scores of `denoiser`'s groups, with what their units cost."""
        groups = [group for group in find_groups(denoiser) if group.name in values]
        return cls(
            values={g.name: values[g.name].detach().float().cpu() for g in groups},
            kinds={g.name: g.kind for g in groups},
            costs={g.name: unit_parameters(denoiser, g) for g in groups},
            total=sum(p.numel() for p in denoiser.parameters()),
            metadata=dict(metadata),
        )

    @property
    def ceiling(self) -> float:
        """The largest ratio that can be asked for: the share of parameters that units hold."""
        return self.removable / self.total

    @property
    def removable(self) -> int:
        """Parameters that go if every unit goes."""
        return sum(self.costs[name] * len(v) for name, v in self.values.items())

    def removed(self, plan: Mapping[str, Tensor]) -> int:
        """Parameters that `plan` removes."""
        return sum(self.costs[name] * int((~keep).sum()) for name, keep in plan.items())

    def plan(self, ratio: float | None = None, *, params: int | None = None, align: bool = True) -> PrunePlan:
        """Cut the ranking at a size.

        Args:
            ratio: fraction of the denoiser's parameters to remove, or
            params: parameters that the pruned denoiser may have.
            align: remove FFN neurons in blocks, so that the widths that remain are multiples of 64
                where a layer has at least 1024 neurons, else of 8: what matrix units like.

        Raises:
            BudgetError: out of range; the message names the model's ceiling.
        """
        if (ratio is None) == (params is None):
            raise BudgetError("Give one size: ratio= or params=.")
        if ratio is None:
            ratio = 1 - params / self.total
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise BudgetError(
                f"The ratio is the fraction of parameters to remove, from 0 to "
                f"{self.ceiling:.3f} for this model; {ratio!r} is not."
            )
        if ratio > self.ceiling:
            raise BudgetError(
                f"At most {self.ceiling:.1%} of this model's parameters can be removed: the rest "
                f"is not in heads or FFN neurons. {ratio:.1%} is too much."
            )
        blocks = [b for name in self.values for b in self._blocks(name, align)]
        blocks.sort(key=lambda block: block[0])
        keep = {name: torch.ones(len(v), dtype=torch.bool) for name, v in self.values.items()}
        target, removed = ratio * self.total, 0
        for _, name, members in blocks:
            cost = self.costs[name] * len(members)
            if removed + cost / 2 > target:  # stop where the size is nearest to what was asked
                break
            keep[name][members] = False
            removed += cost
        facts = {"ratio": round(ratio, 6), "params_dense": self.total}
        facts["params_pruned"] = self.total - removed
        return PrunePlan(keep, self.metadata | facts)

    def _blocks(self, name: str, align: bool) -> Iterator[tuple[float, str, Tensor]]:
        """Units of a group in the order in which they go, (score, name, members) a block.

        Blocks are runs of the group's own ranking, so their mean scores rise too; the first one
        takes what does not fill a block.
        """
        values = self.values[name]
        width = 1
        if align and self.kinds[name] == "ffn":
            width = 64 if len(values) >= 1024 else min(8, len(values))
        ranked, order = values.sort(stable=True)
        first = len(values) % width
        sizes = [first] * (first > 0) + [width] * (len(values) // width)
        for scores, members in zip(ranked.split(sizes), order.split(sizes), strict=True):
            yield float(scores.mean()), name, members

    def save(self, path: str | Path) -> Path:
        """Write the scores: safetensors, float32, costs and metadata in the header."""
        header = {
            "format": SCORES_FORMAT,
            "about": json.dumps(
                {
                    "kinds": self.kinds,
                    "costs": self.costs,
                    "total": self.total,
                    "metadata": self.metadata,
                }
            ),
        }
        return _write(path, {n: v.contiguous() for n, v in self.values.items()}, header)

    @classmethod
    def load(cls, path: str | Path) -> "Scores":
        """Read scores. Raises CheckpointError if the file is not what `save` writes."""
        header, values = _read(path, SCORES_FORMAT, torch.float32)
        try:
            about = json.loads(header["about"])
            if set(about["kinds"]) != set(values) or set(about["costs"]) != set(values):
                raise ValueError("its list of groups does not match its contents")
            ordered = {name: values[name] for name in about["kinds"]}
            return cls(ordered, about["kinds"], about["costs"], about["total"], about["metadata"])
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a valid scores file: {error}") from None


def _write(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Could not write {path}: {error}. Is the disk full?") from None
    return path


def _read(path: str | Path, expected: str, dtype: torch.dtype):
    """Header and tensors of one of ecodiff's small files, checked before anything is allocated."""
    path, kind = Path(path), expected.split(".")[1]
    if not path.is_file():
        raise CheckpointError(f"There is no {kind} file at {path}.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise CheckpointError(f"{path} is too large for a {kind} file.")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != expected:
                raise CheckpointError(
                    f"{path} is not a {kind} file of ecodiff: its format is "
                    f"{header.get('format')!r}, expected {expected!r}."
                )
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}).") from None
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or tensor.ndim != 1:
            raise CheckpointError(f"{path} is not a valid {kind} file: {name!r} has a wrong type.")
    return header, tensors
