"""Ways to export a pruned pipeline, by name: the modules that are imported here register theirs."""

from . import comfyui, dense, fp8, gguf, int8, nf4  # noqa: F401 - imported for what they register
from .dense import filled, save_filled
from .export import FORMATS, find_format

__all__ = ["FORMATS", "filled", "find_format", "save_filled"]
