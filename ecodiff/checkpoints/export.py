"""The registry of export formats: `@format` registers one; `formats` imports all."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from ..errors import CheckpointError
from .saving import save


@dataclass(frozen=True)
class Format:
    """One way to write a pruned pipeline.

    Attributes:
        name: as in options and the API.
        words: what the result is, for people.
        write: (pipeline, path, dtype of the weights in the files or None, card) to where it lies.
    """

    name: str
    words: str
    write: Callable[..., Path]


FORMATS: dict[str, Format] = {}


def format(name: str, words: str) -> Callable:
    """Register a function (pipe, out, dtype) -> Path as an export format."""

    def register(write: Callable) -> Callable:
        FORMATS[name] = Format(name, words, write)
        return write

    return register


def find_format(name: str) -> Format:
    """The format of that name. Raises CheckpointError if there is none."""
    if name not in FORMATS:
        raise CheckpointError(f"There is no format {name!r}. Formats: {', '.join(FORMATS)}.")
    return FORMATS[name]


@format("diffusers", "a diffusers folder that opens with or without ecodiff")
def save_folder(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline as `checkpoints.saving.save` does."""
    return save(pipe, out, dtype, card)
