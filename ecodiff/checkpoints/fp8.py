"""Export with the denoiser's weights in float8, for diffusers' layerwise casting: half of 16 bits."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines import denoiser_name, denoiser_of
from .card import model_card
from .export import format
from .saving import cast, save

NOTE = """
The denoiser's weights are stored in float8 (e4m3), as diffusers' layerwise casting stores them: norms and a
few others stay as they are. Opened as above they are cast up; to keep them in 8 bits, and cast layer by layer
while drawing:

```python
pipe.{name}.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
```
"""


@format("fp8", "a diffusers folder with the denoiser in float8: half the size, for layerwise casting")
def save_fp8(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline whose denoiser is stored in float8, as diffusers' layerwise casting stores it.

    Args:
        dtype: of all other weights; float32 and None: bfloat16.

    Raises: as `checkpoints.saving.save`.
    """
    other = dtype if dtype and dtype.itemsize == 2 else torch.bfloat16
    name = denoiser_name(pipe)
    card = card or model_card(pipe)
    small: Any = cast(pipe, other)  # a copy
    denoiser_of(small).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=other)
    return save(small, out, None, card.rstrip() + "\n" + NOTE.format(name=name))
