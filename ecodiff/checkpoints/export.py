"""The registry of export formats: `@format` registers one; `formats` imports all."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
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
        needs: the package that writes it, if it is none that ecodiff is installed with.
    """

    name: str
    words: str
    write: Callable[..., Path]
    needs: str = ""

    @property
    def here(self) -> bool:
        """True if what writes it is installed."""
        return not self.needs or find_spec(self.needs) is not None


FORMATS: dict[str, Format] = {}


def format(name: str, words: str, needs: str = "") -> Callable:
    """Register a function (pipe, out, dtype, card) -> Path as an export format."""

    def register(write: Callable) -> Callable:
        FORMATS[name] = Format(name, words, write, needs)
        return write

    return register


def find_format(name: str) -> Format:
    """The format of that name. Raises CheckpointError if there is none, or what writes it is missing."""
    if name not in FORMATS:
        raise CheckpointError(f"There is no format {name!r}. Formats: {', '.join(FORMATS)}.")
    found = FORMATS[name]
    if not found.here:
        raise CheckpointError(
            f"The format {name} is made by {found.needs}, which is not installed: pip install {found.needs}."
        )
    return found


@format("diffusers", "a diffusers folder that opens with or without ecodiff")
def save_folder(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline as `checkpoints.saving.save` does."""
    return save(pipe, out, dtype, card)
