"""The files that ecodiff writes for itself: safetensors and JSON, whole or not at all, checked when read."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import CheckpointError, EcodiffError

PLAN_FILE = "ecodiff_plan.safetensors"  # in a pruned folder
MAX_HEADER_BYTES = 4 << 20  # a plan of FLUX.1 has 20 KB
MAX_TENSORS = 20_000
MAX_FILE_BYTES = 128 << 20  # FLUX.1 has 2 M units: 4 MB of scores, 250 kB of plan; directions 75 MB


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
    """Write JSON, whole or not at all. Returns the path. Raises CheckpointError, as `write_tensors`."""
    return write_text(path, json.dumps(data, indent=1))


def write_text(path: str | Path, text: str) -> Path:
    """Write text, whole or not at all. Returns the path. Raises CheckpointError, as `write_tensors`."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Could not write {path}: {error}. Is the disk full?") from None
    return path


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn whatever a stranger's file makes its readers raise into one sentence, without paths.

    Args:
        name: of the file, for the sentence.

    Raises:
        CheckpointError
    """
    try:
        yield
    except EcodiffError:
        raise
    except Exception as error:  # readers of damaged files raise anything
        raise CheckpointError(f"{name} cannot be read: {in_short(error)}") from None


def in_short(error: Exception) -> str:
    """The first line of an error, at most 200 characters, without paths."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"(?:/[\w.+-]+){2,}", "…", line)[:200]


def check_header(path: Path, most_bytes: int = MAX_HEADER_BYTES, most: int = MAX_TENSORS) -> None:
    """Raise CheckpointError unless a safetensors file has a header of a size that is worth parsing.

    Args:
        most_bytes, most: of the header, and of tensors in it.
    """
    with reading(path.name), path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(most_bytes, path.stat().st_size):
            raise CheckpointError(f"{path.name} is truncated, or not a safetensors file.")
        if file.read(size).count(b"data_offsets") > most:
            raise CheckpointError(f"{path.name} holds more than {most} tensors.")


def check_zip(path: Path, most: int) -> None:
    """Raise CheckpointError unless a zip says that it has at most `most` entries, before listing them."""
    with reading(path.name), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16) - 22))
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 22:
            raise CheckpointError(f"{path.name} is not a zip file.")
        count, listed = int.from_bytes(tail[end + 10 : end + 12], "little"), tail[end + 12 : end + 16]
        if count > most or int.from_bytes(listed, "little") > most * 1024:
            raise CheckpointError(f"{path.name} has too many entries.")


def read_header(path: str | Path) -> dict[str, str]:
    """The header of a safetensors file, without its tensors; {} if there is none or it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return {}


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
    check_header(path)
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
