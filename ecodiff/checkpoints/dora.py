"""DoRAs: LoRAs that also say how long every row of the weight is (Liu et al. 2024, arXiv 2402.09353).

W' = g (W + B A) with g = m / ||W + B A||, row by row. Fused and pruned, that is g (V + B' A') of the pruned
layer V; as a DoRA of V it has the magnitudes g ||V + B' A'||. So the norms of the dense weights count, which
a LoRA does without. kohya's and LyCORIS' `dora_scale` and PEFT's `lora_magnitude_vector` are read.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..storage import check_header, reading
from .lora_names import Names

SUFFIX = ".lora_magnitude_vector"  # of PEFT
_SUFFIXES = (f"{SUFFIX}.default.weight", f"{SUFFIX}.weight", SUFFIX, ".dora_scale")


def is_dora(path: str | Path) -> bool:
    """True if a LoRA's file holds magnitudes. Raises CheckpointError if it is no safetensors file."""
    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    check_header(path, most_bytes=16 << 20)
    with reading(path.name), safe_open(path, framework="pt") as file:
        return any(key.endswith(_SUFFIXES) for key in file.keys())  # noqa: SIM118


def taken_out(
    stored: Mapping[str, Tensor], names: Names
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """(magnitudes of diffusers' layers, (rows,) each; all other tensors; parts of the rest, with why not).

    Layers of text encoders lose their pair too: without its magnitudes it is another update.

    Raises:
        CheckpointError: magnitudes of columns.
    """
    found: dict[str, Tensor] = {}
    rest, lost = dict(stored), {}
    for key in [key for key in stored if key.endswith(_SUFFIXES)]:
        ending = next(suffix for suffix in _SUFFIXES if key.endswith(suffix))
        layer, magnitude = key.removesuffix(ending), rest.pop(key)
        layers = names.layers(layer)
        if layers is None:
            for other in [other for other in rest if other.startswith(f"{layer}.")]:
                del rest[other]
            lost[layer] = "a DoRA's magnitudes are taken over on the denoiser only"
            continue
        if magnitude.ndim == 2 and magnitude.shape[0] == 1 and ending == ".dora_scale":
            raise CheckpointError(
                f"This DoRA says how long columns of {layer:.80} are, not rows: that cannot be written for a "
                "pruned layer. Fuse it into the dense model, and prune that."
            )
        widths = [len(names.modules[name].weight) for name in layers]
        if magnitude.numel() != sum(widths):
            raise CheckpointError(f"{key:.80} has {magnitude.numel()} rows, and {sum(widths)} in this model.")
        parts = magnitude.flatten().split(widths)
        if layer.replace(".", "_").endswith("final_layer_adaLN_modulation_1"):
            parts = tuple(part.roll(len(part) // 2) for part in parts)  # shift and scale change places
        found |= dict(zip(layers, parts, strict=True))
    return found, rest, lost


def norms(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """||W + B A|| of each row, (rows,)."""
    update = up.flatten(1) @ down.flatten(1)
    return (weight.detach().float().flatten(1) + update.to(weight.device)).norm(dim=1).cpu()


def magnitudes(layer: nn.Module, gains: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """What a DoRA of a pruned layer says, so that its rows grow by `gains`; in PEFT's shape."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    made = gains * norms(weight, down, up)
    return made.reshape(1, -1, *(1 for _ in weight.shape[2:])) if weight.ndim > 2 else made
