"""Export with the denoiser's weights in 4 bits, as bitsandbytes stores NF4: opened by diffusers on a GPU.

NF4 (Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3 and appendix E): the 16 quantiles of a normal
distribution, scaled by the largest of every 64 weights. Packed here, as bitsandbytes is made for GPUs; equal
to its own packing bit for bit (test_nf4.py).
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from ..pipelines import denoiser_name, denoiser_of
from .card import model_card
from .export import format
from .saving import cast, pruned_by, write

BLOCK = 64  # weights that share a scale
CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_IN_A_BLOCK = re.compile(r"\.\d+\.")
NOTE = """
The denoiser's Linears are stored in 4 bits (NF4 of bitsandbytes, {share:.0%} of its weights); all else is
bfloat16. diffusers reads how from the config, and needs bitsandbytes and a GPU to open it.
"""


def packed(weight: Tensor) -> dict[str, Tensor]:
    """What bitsandbytes stores of a weight, by what is added to its name.

    Args:
        weight: of any shape and floating type.
    """
    flat = weight.detach().float().flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    code = torch.tensor(CODE)
    between = (code[1:] + code[:-1]) / 2
    values = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    numbers = torch.bucketize(values, between).to(torch.uint8).flatten()[: len(flat) + len(flat) % 2]
    state = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": "bfloat16", "shape": list(weight.shape)}
    return {
        "": (numbers[::2] << 4 | numbers[1::2])[:, None],  # the first in the upper half
        ".absmax": scale,
        ".quant_map": code,
        ".quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def left_alone(denoiser: nn.Module) -> list[str]:
    """Linears that stay in 16 bits: embeddings and the last layer, as in other 4-bit files; and such that
    bitsandbytes' would not do for, which lost all units or scatter the rows they have.

    diffusers leaves every layer alone that is called like one of the list, wherever it is: a last layer whose
    name is that of layers in blocks, too (FLUX's proj_out), is quantised with them.
    """
    linears = {path: m for path, m in denoiser.named_modules() if isinstance(m, nn.Linear)}
    inside = {path.rpartition(".")[2] for path in linears if _IN_A_BLOCK.search(path)}
    outside = {path for path in linears if not _IN_A_BLOCK.search(path) and path not in inside}
    unlike = {path for path, m in linears.items() if type(m) is not nn.Linear or not m.weight.numel()}
    return sorted(outside | unlike)


@format("nf4", "a diffusers folder with the denoiser in 4 bits (NF4, for bitsandbytes on a GPU)")
def save_nf4(
    pipe: DiffusionPipeline, out: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
    """Write a pruned pipeline whose denoiser's Linears are in NF4, as bitsandbytes stores them.

    Args:
        dtype: not used: what is not quantised is bfloat16.

    Raises:
        CheckpointError: as `checkpoints.saving.save`.
        UnsupportedModelError: it is not pruned.
    """
    plan = pruned_by(pipe)
    small: Any = cast(pipe, torch.bfloat16)  # a copy
    denoiser: Any = denoiser_of(small)
    apart = left_alone(denoiser)
    chosen = {
        f"{path}.weight"
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) and path not in apart
    }
    share = sum(denoiser.get_parameter(name).numel() for name in chosen) / denoiser.num_parameters()
    text = (card or model_card(pipe, dtype="bfloat16")).rstrip() + "\n" + NOTE.format(share=share)
    return write(small, out, plan, text, partial(_pack, denoiser_name(pipe), chosen, apart))


def _pack(name: str, chosen: set[str], apart: list[str], folder: Path) -> None:
    """Put 4 bits in the place of a written denoiser's weights, and say so in its config."""
    place = folder / name
    tensors: dict[str, Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        for key, tensor in load_file(file).items():
            found = packed(tensor) if key in chosen else {"": tensor}
            tensors |= {key + more: part for more, part in found.items()}
        file.unlink()
    for index in place.glob("*.safetensors.index.json"):
        index.unlink()
    save_torch_state_dict(
        tensors,
        place,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_skip_modules": apart,
    }
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
