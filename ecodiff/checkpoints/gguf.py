"""Export as GGUF: what `comfyui` writes, with weights in 8, 5 or 4 bits, as people with small GPUs draw.

Opened by ecodiff's node, through ComfyUI-GGUF. Blocks of 32 values share a scale (llama.cpp's Q8_0, Q5_0 and
Q4_0: those that its Python package writes). Names, `general.architecture` and `comfy.gguf.orig_shape.NAME`
are those of ComfyUI-GGUF; beside them the header of `comfyui`, and in it "empty", {name: shape}: tensors of
layers that lost all their units, which GGUF cannot hold.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..errors import CheckpointError
from ..storage import in_short
from ..units import BASIS
from .comfyui import FORMAT, HEADER, described
from .export import format

KINDS = {"Q8_0": 8.5, "Q5_0": 5.5, "Q4_0": 4.5}  # bits a value, its part of the scale included
BLOCK = 32  # values that share a scale
ARCHITECTURES = {
    "SD15": "sd1",
    "SDXL": "sdxl",
    "SD3": "sd3",
    "Flux": "flux",
    "FluxSchnell": "flux",
    "QwenImage": "qwen_image",
    "ZImage": "lumina2",
}
SHAPE = "comfy.gguf.orig_shape."
SMALL = 1024  # values; up to here a tensor stays in 32 bits, as ComfyUI-GGUF's converter leaves it
# First and last layers and embeddings stay in 16 bits, as in the files that people share.
KEPT = (
    *("img_in.", "txt_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer."),
    *("time_embed.", "label_emb.", "input_blocks.0.0.", "out.2."),
    *("x_embedder.", "context_embedder.", "t_embedder.", "y_embedder.", "pos_embed"),
    *("time_text_embed.", "norm_out.", "proj_out.", "cap_embedder.", BASIS),
)


def kind_of(name: str, tensor: Tensor, kind: str) -> str:
    """How a tensor is stored: F32, F16, or `kind`, one of `KINDS`."""
    if tensor.ndim < 2 or tensor.numel() <= SMALL or name.endswith("_pad_token"):
        return "F32"
    if not name.startswith(KEPT) and tensor.numel() % BLOCK == 0:
        return kind
    return "F16" if tensor.abs().max() <= torch.finfo(torch.float16).max else "F32"


def stored_shape(tensor: Tensor, kind: str) -> tuple[int, ...]:
    """The shape that a tensor is stored in: rows of whole blocks, if they are not its own rows."""
    if kind not in KINDS or tensor.shape[-1] % BLOCK == 0:
        return tuple(tensor.shape)
    return tensor.numel() // BLOCK, BLOCK


def save_gguf(
    pipe: DiffusionPipeline,
    out: str | Path,
    dtype: torch.dtype | None = None,
    card: str = "",
    kind: str = "Q8_0",
) -> Path:
    """Write a pruned denoiser as GGUF for integrations/comfyui. Text encoders and VAE are the dense model's.

    Args:
        out: a .gguf file, or a folder to put it in under its own name and `kind`.
        dtype, card: not used.
        kind: of `KINDS`, for weights of Linears and convolutions between the first and the last layer.

    Raises:
        CheckpointError: `out` exists, or cannot be written.
        UnsupportedModelError: as `comfyui.described`.
    """
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    tensors, header = described(pipe)
    out = Path(out)
    file = out if out.suffix == ".gguf" else out / f"{out.name}-{kind}.gguf"
    if file.exists():
        raise CheckpointError(f"{file} exists. Name a new folder or file.")
    empty = {name: list(tensor.shape) for name, tensor in tensors.items() if not tensor.numel()}
    full = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    kinds = {name: GGMLQuantizationType[kind_of(name, tensor, kind)] for name, tensor in full.items()}
    shapes = {name: stored_shape(tensor, kinds[name].name) for name, tensor in full.items()}

    partial_file = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writer = GGUFWriter(partial_file, ARCHITECTURES[header["model"]])
        writer.add_quantization_version(2)
        writer.add_string(HEADER, json.dumps({"format": FORMAT, "empty": empty} | header))
        for name, tensor in full.items():
            if shapes[name] != tuple(tensor.shape):
                writer.add_array(SHAPE + name, list(tensor.shape))
            rows = quant_shape_to_byte_shape(shapes[name], kinds[name])
            writer.add_tensor_info(name, rows, np.dtype(np.uint8), math.prod(rows), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in full:  # one at a time: a file of 12 GB is not made in memory
            values = full[name].detach().float().cpu().reshape(shapes[name]).numpy()
            writer.write_tensor_data(quantize(values, kinds[name]))
        writer.close()
        partial_file.replace(file)
    except OSError as error:
        partial_file.unlink(missing_ok=True)
        raise CheckpointError(f"Could not write {file}: {in_short(error)}. Is the disk full?") from None
    return file


for _kind, _bits in KINDS.items():
    _words = f"one GGUF file for ecodiff's ComfyUI node, {_bits} bits a weight"
    format(f"gguf-{_kind.lower()}", _words, needs="gguf")(partial(save_gguf, kind=_kind))
