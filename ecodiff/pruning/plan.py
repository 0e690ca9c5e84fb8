"""Opening pipelines and writing pruned ones: diffusers folders, safetensors and JSON only."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, PlanError
from ..storage import PLAN_FILE as PLAN_FILE
from ..storage import read_tensors, write_tensors

PLAN_FORMAT = "ecodiff.plan.1"

MAX_UNITS = 1 << 20  # in one group

PARTS = ("project", "lift")  # of a basis: Z and Y

_GROUP_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_OF_ENCODER = re.compile(r"(text_encoder(?:_\d+)?)\.(.+)")


class PrunePlan(Mapping[str, Tensor]):
    """Which units stay: {group name: bool (group.size,)}. A group that is not named is kept whole.

    Args:
        keep: one bool tensor a group, True where the unit stays.
        metadata: JSON-able facts that travel in the file: model, ratio, method.
        bases: of groups of directions, what is kept of them: {group: (Z, Y)}, float32 (kept, features) and
            (features, kept), features those of a head for directions inside heads; a group that has none is
            cut along the features themselves.

    Groups of a text encoder are named after it: "text_encoder_2.encoder.block.0.layer.0.SelfAttention".

    Example:
        >>> plan = PrunePlan({group.name: torch.rand(group.size) > 0.2 for group in groups})
        >>> plan.save("mine.safetensors")
    """

    def __init__(
        self,
        keep: Mapping[str, Tensor],
        metadata: Mapping | None = None,
        bases: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ):
        self._keep: dict[str, Tensor] = {}
        for name, mask in keep.items():
            mask = torch.as_tensor(mask)
            if mask.dtype != torch.bool or mask.ndim != 1:
                raise PlanError(
                    f"The plan of {name} must be a bool tensor of shape (units,), "
                    f"not {str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}."
                )
            self._keep[name] = mask.cpu()
        self.metadata = dict(metadata or {})
        given = getattr(keep, "bases", {}) if bases is None else bases
        self.bases = {name: parts for name, parts in given.items() if name in keep and self._keep[name].any()}

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Components that it cuts besides the denoiser: groups of theirs are named after them."""
        found = [match.group(1) for name in self if (match := _OF_ENCODER.fullmatch(name))]
        return tuple(dict.fromkeys(found))

    def part(self, text_encoder: str = "") -> "PrunePlan":
        """What of it is the denoiser's, or a text encoder's, by that component's own names of groups."""
        if not text_encoder and not self.text_encoders:
            return self
        if text_encoder:
            start = f"{text_encoder}."
            own = {name.removeprefix(start): keep for name, keep in self.items() if name.startswith(start)}
            return PrunePlan(own, self.metadata)
        own = {name: keep for name, keep in self.items() if not _OF_ENCODER.fullmatch(name)}
        return PrunePlan(own, self.metadata, self.bases)

    def joined(self, text_encoders: "PrunePlan") -> "PrunePlan":
        """This one of a denoiser, and one of text encoders (`Scores.plan` of `rank_text_encoders`)."""
        facts = {name: text_encoders.metadata.get(name) for name in ("params_dense", "params_pruned")}
        about = self.metadata | {"text_encoders": facts}
        return PrunePlan({**self, **text_encoders}, about, self.bases)

    def basis(self, name: str) -> tuple[Tensor, Tensor]:
        """(Z, Y) of what is kept of a group of directions."""
        if name in self.bases:
            return self.bases[name]
        chosen = torch.eye(len(self[name]))[self[name]]
        return chosen, chosen.T

    def __getitem__(self, name: str) -> Tensor:
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
        basis = str(self.metadata.get("basis", ""))  # the digest of directions, if some were cut
        return hashlib.sha256(packed.encode() + basis.encode()).hexdigest()

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

    def save(self, path: str | Path) -> Path:
        """Write the plan: safetensors, one bit-packed uint8 tensor a group. Returns the path."""
        tensors = {n: torch.from_numpy(np.packbits(keep.numpy())) for n, keep in self.items()}
        sizes = {name: len(keep) for name, keep in self.items()}
        header = {
            "format": PLAN_FORMAT,
            "sizes": json.dumps(sizes),
            "metadata": json.dumps(self.metadata),
        }
        for name, pair in self.bases.items():
            for part, matrix in zip(PARTS, pair, strict=True):
                tensors[f"{name}.{part}"] = matrix.float().contiguous().flatten().view(torch.uint8)
        if self.bases:
            header["bases"] = json.dumps(list(self.bases))
        return write_tensors(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> "PrunePlan":
        """Read a plan file.

        Raises:
            CheckpointError: not a plan, truncated, too large, or of a newer format.
        """
        header, tensors = read_tensors(path, PLAN_FORMAT, torch.uint8)
        try:
            sizes, metadata = json.loads(header["sizes"]), json.loads(header["metadata"])
            named = json.loads(header.get("bases", "[]"))
            parts = {name: [tensors.pop(f"{name}.{part}") for part in PARTS] for name in named}
            if set(sizes) != set(tensors) or not isinstance(metadata, dict):
                raise PlanError("its list of groups does not match its contents")
            keep = {n: _unpack_bits(n, sizes[n], tensors[n].numpy()) for n in sorted(sizes)}
            bases = {name: _unpack_basis(keep[name], *parts[name]) for name in named}
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not a valid plan file: {error}") from None
        return cls(keep, metadata, bases)


def named_in(name: str) -> tuple[str, str]:
    """The text encoder that a group or a weight is named after, "" for the denoiser; and its name there."""
    match = _OF_ENCODER.fullmatch(name)
    return (match.group(1), match.group(2)) if match else ("", name)


def packed_rows(rows: Tensor, width: int) -> list:
    """Which of `width` rows there are, packed as a plan's units are: [width, base64 of the bits]."""
    bits = torch.zeros(width, dtype=torch.bool)
    bits[rows.cpu()] = True
    return PrunePlan({"rows": bits}).packed()["rows"]


def _unpack_basis(keep: Tensor, project: Tensor, lift: Tensor) -> tuple[Tensor, Tensor]:
    count, size = int(keep.sum()), len(keep)
    width = project.numel() // max(1, 4 * count)  # of all features, or of a head's
    if not width or size % width or any(part.numel() != 4 * count * width for part in (project, lift)):
        raise PlanError(f"its directions are not {count} of {size}")
    z, y = project.view(torch.float32).view(count, width), lift.view(torch.float32).view(width, count)
    if not (z.isfinite().all() and y.isfinite().all()):
        raise PlanError("its directions are not finite")
    return z, y


def _unpack_bits(name: str, size: int, packed: np.ndarray) -> Tensor:
    if not _GROUP_NAME.fullmatch(name) or type(size) is not int or not 0 < size <= MAX_UNITS:
        raise PlanError(f"{name!r} with {size!r} units is not a group of a model.")
    if packed.shape != (-(-size // 8),):
        raise PlanError(f"{name} has {packed.size} bytes for {size} units.")
    return torch.from_numpy(np.unpackbits(packed, count=size).astype(bool))
