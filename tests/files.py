"""Files that people have, by what their headers say, and what ecodiff does with each.

docs/checkpoints.md has a table of them, written by `python -m tests.support`; test_single_file.py tries every
row. Values are holes: what a file is, is told by names, types and shapes.
"""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from ecodiff import catalog
from ecodiff.checkpoints import loading
from ecodiff.checkpoints.comfyui import flux, sd3, unet
from ecodiff.errors import CheckpointError

Build = Callable[[Path], str]


def header_only(path: Path, tensors: dict[str, Tensor], dtype: str = "BF16") -> str:
    """A file with these names and shapes, whose values are a hole."""
    entries, at = {}, 0
    for name, tensor in tensors.items():
        size = 2 * tensor.numel()
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return str(path)


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def whole_sd15() -> dict[str, Tensor]:
    text = {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.empty(8, 768)}
    return prefixed("model.diffusion_model.", unet.tensors(loading.empty_denoiser("sd-1.5"))) | text


AUTHORS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "sdxl": lambda: prefixed("model.diffusion_model.", unet.tensors(loading.empty_denoiser("sdxl"))),
    "sd-1.5": whole_sd15,
    "sd-3.5-medium": lambda: sd3.tensors(loading.empty_denoiser("sd-3.5-medium")),
    "flux-dev": lambda: flux.tensors(loading.empty_denoiser("flux-dev")),
    "flux-schnell": lambda: prefixed(
        "model.diffusion_model.", flux.tensors(loading.empty_denoiser("flux-schnell"))
    ),
}
DIFFUSERS = (
    "sdxl",
    "sd-3.5-medium",
    "flux-2-dev",
    "flux-2-klein",
    "flux-2-klein-9b",
    "pixart-sigma",
    "sana-1.6b",
    "sana-1.5",
    "z-image",
    "qwen-image",
    "wan-2.1-1.3b",
    "wan-2.1-14b",
    "chroma",
)
OTHERS: dict[str, dict[str, tuple[int, ...]]] = {
    "LoRA, PEFT's names": {"unet.down_blocks.0.attn.to_q.lora_A.weight": (4, 320)},
    "LoRA, kohya's names": {"lora_unet_down_blocks_0_to_q.lora_down.weight": (4, 320)},
    "GPTQ": {"transformer_blocks.0.attn.to_q.qweight": (4, 4)},
    "nunchaku": {"transformer_blocks.0.attn.to_q.smooth_factor": (4,)},
    "an autoencoder alone": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
    "CLIP alone": {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 8)},
    "a language model": {"model.embed_tokens.weight": (8, 8)},
}


def written(tensors: Callable[[], dict[str, Tensor]], folder: Path) -> str:
    return header_only(folder / "file.safetensors", tensors())


def half() -> dict[str, Tensor]:
    return dict(list(AUTHORS["sdxl"]().items())[::2])


def of_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def called(name: str, folder: Path) -> str:
    (folder / name).write_bytes(b"anything")
    return str(folder / name)


# {what it is: (the catalogue's model that it is one of, a function that writes it into a folder)}
FILES: dict[str, tuple[str, Build]] = {
    f"{name}, the authors' layout": (name, partial(written, build)) for name, build in AUTHORS.items()
}
FILES |= {
    f"{name}, diffusers' layout": (
        name,
        partial(written, lambda name=name: loading.empty_denoiser(name).state_dict()),
    )
    for name in DIFFUSERS
}
FILES |= {what: ("", partial(written, partial(of_shapes, shapes))) for what, shapes in OTHERS.items()}
FILES["half of SDXL's tensors"] = ("", partial(written, half))
FILES |= {
    f"`{name}`": ("", partial(called, name))
    for name in ("model.gguf", "model.ckpt", "model.pt", "model.zip", "notes.txt")
}


def happens(what: str, folder: Path) -> str:
    """What ecodiff makes of a file: "opened", or in which words it refuses it."""
    model, build = FILES[what]
    file = build(folder)
    try:
        if not file.endswith(".safetensors"):
            loading.load(file)
        base = loading.base_of(file)
    except CheckpointError as error:
        return str(error).replace(file, "It").replace("|", r"\|")
    return "opened" if base == catalog.MODELS[model].source else f"opened as {base}"


def table() -> str:
    """The table in docs/checkpoints.md."""
    lines = ["| file | what happens |", "|---|---|"]
    for what in FILES:
        with TemporaryDirectory() as folder:
            lines.append(row(what, happens(what, Path(folder))))
    return "\n".join(lines) + "\n"


def row(what: str, outcome: str) -> str:
    return f"| {what} | {outcome} |"
