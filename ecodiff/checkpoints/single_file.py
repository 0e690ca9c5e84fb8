"""Checkpoints in one file: what they are, told by the names and shapes in their headers.

diffusers guesses a model by a few names and takes Stable Diffusion 1.5 for what it does not know. Here a
guess is tried: the file's tensors, converted on the meta device, must be those of the model. Only headers are
read; a file of 64 GB is not mapped for it.
"""

import json
import re
import struct
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import EulerDiscreteScheduler
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, SafetensorsParsingError
from huggingface_hub.file_download import get_hf_file_metadata
from safetensors import safe_open
from torch import Tensor

from .. import catalog
from ..errors import CheckpointError
from ..model_files import few_steps
from .sign_in import NETWORK_ERRORS, PROBE_SECONDS, hub_token, unreachable

MAX_HEADER = 100 << 20  # bytes, as safetensors itself allows

# How the names of text encoders and of the autoencoder begin in the original authors' files.
TEXT_ENCODERS = ("conditioner.", "cond_stage_model.", "text_encoders.")
AUTOENCODER = ("first_stage_model.", "vae.")
_PREFIXES = ("", "model.diffusion_model.", "transformer.", "unet.", "diffusion_model.")
_LORA = re.compile(r"lora_(A|B|up|down)|\.lora\.|hada_w|lokr_w|dora_scale")
_SCALES = (".scale_weight", ".weight_scale")  # of fp8 weights, by what they are called after
_OTHER_SCALES = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale)$")
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


_ON_HUB = re.compile(r"([^/.~\\:][^/]*/[^/]+)/(.+\.safetensors)")


def is_single_file(source: str) -> bool:
    """True for a checkpoint in one file, here or on the Hub."""
    return bool(on_hub(source)) or (source.endswith(".safetensors") and Path(source).is_file())


def on_hub(source: str) -> tuple[str, str] | None:
    """(repository, file) of owner/name/file.safetensors; None of a file that is here, or anything else."""
    found = _ON_HUB.fullmatch(source)
    if found is None or ".." in source.split("/") or Path(source).parent.is_dir():
        return None
    return found[1], found[2]


def header(source: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(type, shape) of every tensor of a safetensors file, by name; nothing else is read.

    Raises:
        CheckpointError: it is none.
        ModelNotFoundError: it cannot be had from the Hub.
    """
    if (place := on_hub(source)) is not None:
        if not isinstance(there := try_to_load_from_cache(*place), str):
            return _header_on_hub(*place, hub_token())
        source = there
    try:
        return _header(source, Path(source).stat().st_mtime_ns)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source} is not a checkpoint in safetensors: {error}") from None


@lru_cache(maxsize=16)
def _header_on_hub(repository: str, file: str, token: str | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """That of a file on the Hub, of which only the header is fetched."""
    source = f"{repository}/{file}"
    try:
        get_hf_file_metadata(hf_hub_url(repository, file), token=token, timeout=PROBE_SECONDS)
        found = HfApi().parse_safetensors_file_metadata(repository, file, token=token)
    except (HFValidationError, SafetensorsParsingError) as error:
        raise CheckpointError(f"{source} is not a checkpoint in safetensors: {error}") from None
    except (OSError, *NETWORK_ERRORS):
        raise unreachable(source) from None
    return {name: (str(entry.dtype), tuple(entry.shape)) for name, entry in found.tensors.items()}


@cache
def _header(source: str, changed: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """That of a file as it was at a time."""
    with open(source, "rb") as file:  # noqa: PTH123
        (size,) = struct.unpack("<Q", file.read(8))
        if size > MAX_HEADER:
            raise ValueError("its header is too large")
        found = json.loads(file.read(size))
    found.pop("__metadata__", None)
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()}


def base_of(source: str) -> str:
    """The Hub repository of the model whose architecture a single file has.

    Raises:
        CheckpointError: it is no safetensors file, or of no model that is known; says what it is instead.
    """
    names = header(source)
    if any(_LORA.search(name) for name in names):
        raise CheckpointError(
            f"{source} is a LoRA, not a model. Cut it to fit a pruned model with `python -m ecodiff lora`."
        )
    if any(name.endswith((".qweight", ".smooth_factor")) for name in names):
        raise CheckpointError(f"{source} is quantised (nunchaku or GPTQ). Give the full-precision model.")
    empty = {n: _meta(kind, shape) for n, (kind, shape) in names.items() if not _is_scale(n)}
    guess, best = _guess(empty), ("", 0)
    for model in _distinct(guess):
        # Of two, that of which there is more: a variant may have a layer more than another, and all of its.
        if (size := len(_expected(model.name))) > best[1] and _is_of(empty, model):
            best = model.source, size
    if best[1]:
        return best[0]
    if guess and guess not in {model.source for model in catalog.MODELS.values()}:
        return guess  # diffusers knows it by its name, and the catalogue does not have it
    parts = ", ".join(sorted({name.partition(".")[0] for name in names})[:6])
    raise CheckpointError(
        f"{source} is of no model that ecodiff knows by its tensors ({parts}, …). Give a whole checkpoint or "
        "a denoiser, in the layout of its authors or of diffusers; or a diffusers folder."
    )


def _known_base(source: str) -> str:
    """`base_of` for the catalogue, of a file that is here; "" of one that is no model, or not here yet."""
    there = source
    if (place := on_hub(source)) is not None:
        there = try_to_load_from_cache(*place)
    if not isinstance(there, str) or not Path(there).is_file():
        return ""
    try:
        return base_of(there)
    except CheckpointError:
        return ""


catalog.read_files_by(_known_base)


def _distinct(first: str) -> list[catalog.Model]:
    """Models of the catalogue, one an architecture: that of the Hub id `first`, or what comes first."""
    known = [model for model in catalog.MODELS.values() if model.denoiser]
    ordered = sorted(known, key=lambda model: model.source != first)
    return list({json.dumps(model.denoiser): model for model in reversed(ordered)}.values())


def _meta(kind: str, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=_TYPES.get(kind, torch.float32), device="meta")


def _guess(empty: dict[str, Tensor]) -> str:
    """What diffusers takes a file for."""
    try:
        return fetch_diffusers_config(empty)["pretrained_model_name_or_path"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""


def _is_of(empty: dict[str, Tensor], model: catalog.Model) -> bool:
    """True if a file holds the denoiser of a model: every tensor of it, in its shape."""
    expected = _expected(model.name)
    for prefix in _PREFIXES:
        inside = {n.removeprefix(prefix): tuple(t.shape) for n, t in empty.items() if n.startswith(prefix)}
        if all(inside.get(name) == shape for name, shape in expected.items()):
            return True
    cls = model.denoiser["_class_name"] if model.denoiser else ""
    convert = SINGLE_FILE_LOADABLE_CLASSES.get(cls, {}).get("checkpoint_mapping_fn")
    if convert is None:
        return False
    try:
        found = convert(config=dict(_empty(model.name).config), checkpoint=dict(empty))
    except (KeyError, ValueError, RuntimeError, TypeError, IndexError, AttributeError):
        return False
    return all(n in found and tuple(found[n].shape) == shape for n, shape in expected.items())


@cache
def _empty(name: str) -> Any:
    """A catalogue model's denoiser on the meta device."""
    config = catalog.MODELS[name].denoiser or {}
    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)


@cache
def _expected(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(parameter.shape) for key, parameter in _empty(name).named_parameters()}


def _is_scale(name: str) -> bool:
    return name.endswith(_SCALES) or bool(_OTHER_SCALES.search(name))


def open_single_file(source: str, base: str, pipeline: Any, name: str, denoiser: Any, dtype: torch.dtype):
    """The pipeline of a single file; what is not in it comes from the model that it is a variant of.

    Args:
        pipeline, denoiser: classes of the base model; `name`: of the denoiser in it.
    """
    names, called = header(source), source
    if (place := on_hub(source)) is not None:
        source = hf_hub_download(*place, token=hub_token())
    scaled = any(key.endswith(_SCALES) for key in names)
    if any(key.startswith(TEXT_ENCODERS) for key in names):
        if scaled:
            raise CheckpointError(
                f"{source} holds fp8 weights with scales, and text encoders beside them. Give the checkpoint "
                "in bfloat16, or the denoiser alone."
            )
        pipe = pipeline.from_single_file(source, config=base, torch_dtype=dtype, token=hub_token())
    else:
        given: Any = _unscaled(source, dtype) if scaled else source
        options = {"config": base, "torch_dtype": dtype, "token": hub_token()}
        parts = {name: denoiser.from_single_file(given, subfolder=name, **options)}
        if any(key.startswith(AUTOENCODER) for key in names):
            kind = diffusers.AutoencoderKL
            parts["vae"] = kind.from_single_file(source, subfolder="vae", **options)
        pipe = pipeline.from_pretrained(base, dtype=dtype, use_safetensors=True, token=hub_token(), **parts)
    _schedule(pipe, called, names)
    return pipe


def _unscaled(source: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file of fp8 weights, multiplied by their scales."""
    with safe_open(source, framework="pt") as file:
        keys = set(file.keys())
        tensors = {key: file.get_tensor(key) for key in keys if not _is_scale(key)}
        for key in keys:
            for ending in _SCALES:
                weight = f"{key.removesuffix(ending)}.weight"
                if key.endswith(ending) and weight in tensors:
                    scale = file.get_tensor(key).float()
                    shape = (-1, *[1] * (tensors[weight].ndim - 1)) if scale.numel() > 1 else ()
                    tensors[weight] = (tensors[weight].float() * scale.view(shape)).to(dtype)
    return {
        key: t.to(dtype) if t.dtype in (_TYPES["F8_E4M3"], _TYPES["F8_E5M2"]) else t
        for key, t in tensors.items()
    }


def _schedule(pipe: Any, source: str, names: dict) -> None:
    """Give a pipeline the schedule that its file was trained for, as far as the file or its name says so."""
    changes: dict[str, Any] = {}
    if "v_pred" in names:  # a marker that trainers of SDXL write
        changes |= {"prediction_type": "v_prediction"}
        changes |= {"rescale_betas_zero_snr": True} if "ztsnr" in names else {}
    if few_steps(source) and hasattr(pipe, "unet"):
        changes |= {"timestep_spacing": "trailing"}
    if changes:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **changes)
