"""A plan says which units stay.

It is a file of a few kilobytes: one bit a unit.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import BoolTensor, Tensor, nn

from .errors import CheckpointError, PlanError
from .groups import ALL_KINDS, find_groups

PLAN_FORMAT = "ecodiff.plan.1"
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
        groups = {group.name: group for group in find_groups(denoiser, ALL_KINDS)}
        sizes = {name: group.size for name, group in groups.items()}
        for name, keep in self.items():
            if sizes.get(name) != len(keep):
                what = f"{sizes[name]} units" if name in sizes else "no such group"
                raise PlanError(
                    f"This plan does not fit the model: it has {len(keep)} units in {name}, "
                    f"and the {type(denoiser).__name__} has {what} there. Use the model that it "
                    f"was made for{self._made_for()}."
                )
            if int(keep.sum()) < groups[name].floor:
                raise PlanError(f"{name} must keep at least {groups[name].floor} of its units.")

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
        return write_small(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "PrunePlan":
        """Read a plan file.

        Raises:
            CheckpointError: not a plan, truncated, too large, or of a newer format.
        """
        header, tensors = read_small(path, PLAN_FORMAT, torch.uint8)
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


def write_small(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    """Write one of ecodiff's small files, whole or not at all. Returns the path.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=header)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Could not write {path}: {error}. Is the disk full?") from None
    return path


def read_small(
    path: str | Path, expected: str, dtype: torch.dtype
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of one of ecodiff's small files; its size is checked before it is read.

    Raises:
        CheckpointError: no such file, too large, truncated, of another format or dtype.
    """
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
