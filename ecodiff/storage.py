"""The files that ecodiff writes for itself: safetensors and JSON, whole or not at all, checked when read."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

MAX_FILE_BYTES = 64 << 20  # FLUX.1 has 2 M units: 4 MB of scores, 250 kB of plan


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    """Write tensors, from any device, as a safetensors file, whole or not at all. Returns the path.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, partial, metadata=dict(header))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Could not write {path}: {error}. Is the disk full?") from None
    return path


def write_json(path: str | Path, data) -> Path:
    """Write JSON, whole or not at all. Returns the path.

    Raises:
        CheckpointError: as `write_tensors`.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(data, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Could not write {path}: {error}. Is the disk full?") from None
    return path


def read_tensors(
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
