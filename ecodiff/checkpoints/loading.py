"""Opening pipelines: embedded names, diffusers folders, Hub ids and single files."""

import inspect
import os
import sys
from math import inf
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import catalog, machine
from ..checks import without_values
from ..errors import CheckpointError, EcodiffError, ModelNotFoundError, UnsupportedModelError, memory_advice
from ..learning.streaming import LARGE, stream_
from ..machine import free_bytes, megabytes
from ..pipelines import choose_denoiser, denoiser_of
from ..pruning import ecodiff_sliced_v1
from .index import damaged, model_index, refuse_quantised
from .sign_in import NETWORK_ERRORS, PROBE_SECONDS, hub_token, unreachable
from .single_file import base_of, is_single_file, on_hub, open_single_file

# diffusers reads components of a pruned folder from the module that its index names, if imported.
sys.modules.setdefault(ecodiff_sliced_v1.NAME, ecodiff_sliced_v1)

ROUNDED_FROM = 1 << 16  # bytes of a matrix that is worth rounding
_WORDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(
    model: str | Path | catalog.Model,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    offload: bool = False,
    rounded: bool = False,
):
    """Open a pipeline: an embedded model's name, a diffusers folder (dense or pruned), a Hub id, or a
    single .safetensors file, here or on the Hub (owner/name/file.safetensors).

    With "#transformer_2" behind it, the second of its two denoisers is what is pruned.

    Args:
        dtype: None: float32 on a CPU, else `working_dtype`.
        device: None: `machine.device()`. "cuda:0+cuda:1": of what does not fit on the first, weights wait on
            the others, then in main memory.
        offload: if the parts do not fit on the device together, each is there only while it works
            (diffusers' model offloading). Good for drawing; nothing can be learned then. Without, and where
            the largest part is too large by itself, weights come from main memory layer by layer
            (`learning.streaming`): slower, and everything can be done.
        rounded: keep the denoiser's large weights in float8, to rank units on a smaller device.

    Raises:
        OutOfMemoryError: the model does not fit on the device.
        ModelNotFoundError: no such name or folder, no network, or no access.
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: it is not a diffusion pipeline.
    """
    known = catalog.find(model)
    device = device or machine.device()
    if dtype is None:
        dtype = torch.float32 if device.startswith("cpu") else working_dtype(known)
    if known.lora_of:
        return _ready(_fused(known, dtype), device, offload, rounded)
    source = known.source
    try:
        if is_single_file(source):
            return _ready(_from_single_file(source, dtype), device, offload, rounded)
        index = model_index(source)
        refuse_quantised(source, index)
        components: dict[str, Any] = {}
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is None:
                components[name] = None  # SD3 without its T5: diffusers wants to be told
            elif isinstance(entry, list) and entry[0] == ecodiff_sliced_v1.NAME:
                cls = getattr(ecodiff_sliced_v1, str(entry[1]))
                components[name] = cls.from_pretrained(source, subfolder=name, dtype=dtype, token=hub_token())
        components |= {name: _part(source, name, other, dtype) for name, other in known.parts.items()}
        pipe = _from_files(source, str(index.get("_class_name")), dtype, components)
    except EcodiffError:
        raise
    except SafetensorError as error:
        raise damaged(source, error) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, *NETWORK_ERRORS):
        raise unreachable(source) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise damaged(source, error) from None
    if known.component:
        choose_denoiser(pipe, known.component)
    return _ready(pipe, device, offload, rounded)


def _from_files(source: str, name: str, dtype: torch.dtype, components: dict):
    """The pipeline of a folder or repository. Many hold float32 weights and, as a variant, halves:
    of the two, what is nearer to `dtype` is read (and downloaded), or what is there."""
    plain: Exception | None = None
    # By its own class: DiffusionPipeline opens components that are optional (Wan's transformers) once more.
    named = getattr(diffusers, name, None)
    known = inspect.isclass(named) and issubclass(named, DiffusionPipeline)
    pipeline: Any = named if known else DiffusionPipeline
    halves = ("bf16", "fp16") if dtype == torch.bfloat16 else ("fp16", "bf16")
    for variant in (*halves, None) if dtype.itemsize == 2 else (None, *halves):
        options = {"dtype": dtype, "use_safetensors": True, "variant": variant, "token": hub_token()}
        try:
            return pipeline.from_pretrained(source, **options, **components)
        except (LocalEntryNotFoundError, HfHubHTTPError):
            raise
        except (OSError, ValueError) as error:
            plain = error if variant is None else plain
    assert plain is not None
    raise plain


def _part(source: str, name: str, repository: str, dtype: torch.dtype) -> Any:
    """A text encoder, or its tokenizer, that a model reads and its own repository does not hold."""
    try:
        if name.startswith("tokenizer"):
            return AutoTokenizer.from_pretrained(repository, token=hub_token())
        options = {"dtype": dtype, "use_safetensors": True, "token": hub_token()}
        return AutoModelForCausalLM.from_pretrained(repository, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelNotFoundError(
            f"{source} reads {repository} as its {name}, which could not be opened: {reason} If it asks for "
            "it, accept its licence on the Hub, and sign in (hf auth login)."
        ) from None


def _fused(known: catalog.Model, dtype: torch.dtype):
    """The pipeline of a model that is a LoRA of another one, fused into it."""
    pipe = load(known.lora_of, dtype, "cpu")
    repository, file = on_hub(known.source) or ("", "")
    try:
        pipe.load_lora_weights(repository, weight_name=file, token=hub_token())
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except (LocalEntryNotFoundError, HfHubHTTPError, *NETWORK_ERRORS):
        raise unreachable(known.source) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged(known.source, error) from None
    if (named := dict(known.scheduler)) and (cls := getattr(diffusers, named.pop("_class_name"))):
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **named)
    return pipe


def _ready(pipe: DiffusionPipeline, device: str, offload: bool, rounded: bool):
    denoiser_of(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and (missing := without_values(part, name)):
            raise CheckpointError(
                f"The weights of {missing} are not in the files. Was a download interrupted, or is a file "
                "of another version? Get it again."
            )
    parts = [part.eval() for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = [sum(p.numel() * p.element_size() for p in part.parameters()) for part in parts]
    words = f"The weights alone take {megabytes(sum(weights))}. Take a smaller model, or a larger device."
    with memory_advice(words):
        there, *lenders = machine.together(device)
        free = inf if there.type in ("cpu", "mps") else free_bytes(there)
        if sum(weights) <= free and not rounded:
            return pipe.to(there)
        if offload and not lenders and not rounded and max(weights) <= free:
            pipe.enable_model_cpu_offload(device=there)
        else:
            stream_(pipe, there, ROUNDED_FROM if rounded else LARGE, lenders, rounded)
        return pipe


def _from_single_file(source: str, dtype: torch.dtype):
    """The pipeline of a single file; what is not in it comes from the model that it is a variant of."""
    base = base_of(source)
    pipeline, name = classes(base)
    denoiser = getattr(diffusers, model_index(base)[name][1])
    return open_single_file(source, base, pipeline, name, denoiser, dtype)


def empty_denoiser(model: str | catalog.Model) -> nn.Module:
    """The denoiser of a model on the meta device: its shapes, without its weights.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError
    """
    # Not accelerate's init_empty_weights: that changes nn.Module for all threads, and for forks of theirs.
    known = catalog.find(model)
    if known.denoiser:
        with torch.device("meta"):
            return getattr(diffusers, known.denoiser["_class_name"]).from_config(known.denoiser)
    source = known.source
    if is_single_file(source):
        return empty_denoiser(base_of(source))
    index = model_index(source)
    _fetch_settings(source)
    refuse_quantised(source, index)
    name = _denoiser_in(index, known)
    if name is None:
        missing = " and no ".join(f"`{name}`" for name in known.denoisers)
        raise UnsupportedModelError(f"{source} has no {missing} to prune.")
    library, cls_name = index[name]
    module = ecodiff_sliced_v1 if library == ecodiff_sliced_v1.NAME else diffusers
    cls: Any = getattr(module, str(cls_name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
        raise UnsupportedModelError(f"The {name} of {source} is a {cls_name}, not diffusers' own.")
    try:
        with torch.device("meta"):
            known_class: Any = cls
            return known_class.from_config(known_class.load_config(source, subfolder=name, token=hub_token()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, *NETWORK_ERRORS) as error:
        if os.path.isdir(source):
            raise damaged(source, error) from None
        raise unreachable(source) from None


def _fetch_settings(source: str) -> None:
    """Bring into the Hub's cache what `catalog.find` reads of a repository: how it draws, and its licence."""
    for file in () if os.path.isdir(source) else ("scheduler/scheduler_config.json", "README.md"):
        if try_to_load_from_cache(source, file) is not None:
            continue
        try:
            hf_hub_download(source, file, token=hub_token(), etag_timeout=PROBE_SECONDS)
        except (LocalEntryNotFoundError, *NETWORK_ERRORS):
            return  # the Hub cannot be reached: it is asked once
        except (HfHubHTTPError, OSError, ValueError):
            continue  # it is not there, or not for everybody


def classes(model: str | catalog.Model) -> tuple[Any, str]:
    """The class of a model's pipeline, and the name of the denoiser in it; loads no weights."""
    known = catalog.find(model)
    source = catalog.find(known.lora_of or known).source
    index = model_index(base_of(source) if is_single_file(source) else source)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise UnsupportedModelError(f"{source} is a {index.get('_class_name')}, not diffusers' own.")
    return pipeline, _denoiser_in(index, known) or known.denoisers[-1]


def _denoiser_in(index: dict, known: catalog.Model) -> str | None:
    """The component of a pipeline's index that is pruned; None if it has none."""
    return next((name for name in known.denoisers if index.get(name, [None])[0]), None)


def disk_dtype(model: str | catalog.Model) -> torch.dtype:
    """In which type a model's files hold the denoiser's weights, or `working_dtype` if they are not here."""
    known = catalog.find(model)
    for name in known.denoisers:
        files = (Path(known.source) / name).glob("*.safetensors")
        for file in sorted(files, key=lambda file: not {".fp16", ".bf16"} & set(file.suffixes)):
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(next(iter(weights.keys()))).dtype
    return _sixteen_bits(known)


def working_dtype(model: str | catalog.Model) -> torch.dtype:
    """In which type a model works on a GPU: that of its files, if it has 16 bits."""
    known = catalog.find(model)
    found = _WORDS[known.dtype] if known.name in catalog.MODELS else disk_dtype(known)
    return found if found.itemsize == 2 else _sixteen_bits(known)


def _sixteen_bits(known: catalog.Model) -> torch.dtype:
    """The type of the catalogue's model; else float16 for UNets, and for transformers, which need its range,
    bfloat16."""
    if known.name in catalog.MODELS or known.denoiser:
        return _WORDS[known.dtype]
    return torch.float16 if classes(known)[1] == "unet" else torch.bfloat16
