"""ecodiff's small files: safetensors with a JSON header, written whole or not at all, checked when read."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError

MAX_FILE_BYTES = 64 << 20  # FLUX.1 has 2 M units: 4 MB of scores, 250 kB of plan


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
