"""Opening pipelines and writing pruned ones: diffusers folders, safetensors and JSON only."""

import copy
import json
import os
import shutil
import sys
import tempfile
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from . import backends, catalog, ecodiff_sliced_v1
from .errors import CheckpointError, EcodiffError, ModelNotFoundError, UnsupportedModelError, memory_advice
from .groups import denoiser_name, denoiser_of
from .measure import megabytes
from .memory import free_bytes
from .slicing import plan_of

# diffusers reads components of a pruned folder from the module that its index names, if imported.
sys.modules.setdefault(ecodiff_sliced_v1.NAME, ecodiff_sliced_v1)

# How the names of text encoders and autoencoders begin in the original authors' files.
_OTHER_PARTS = ("first_stage_model.", "conditioner.", "cond_stage_model.", "text_encoders.", "vae.")
PLAN_FILE = "ecodiff_plan.safetensors"
# huggingface_hub 1 speaks HTTP with httpx, 2 with httpx2: their errors have no base in common.
NETWORK_ERRORS = tuple(import_module(name).HTTPError for name in ("httpx", "httpx2") if find_spec(name))
_WORDS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(
    model: str | Path, dtype: torch.dtype | None = None, device: str | None = None, offload: bool = False
):
    """Open a pipeline: an embedded model's name, a diffusers folder (dense or pruned), a Hub id, or a
    single .safetensors file in the layout of the original authors.

    Args:
        dtype: None: float32 on a CPU, else `working_dtype`.
        device: None: `backends.device()`.
        offload: if the parts do not fit on the device together, each is there only while it works
            (diffusers' model offloading). Good for drawing; nothing can be learned then.

    Raises:
        OutOfMemoryError: the model does not fit on the device.
        ModelNotFoundError: no such name or folder, no network, or no access.
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: it is not a diffusion pipeline.
    """
    known = catalog.find(str(model))
    device = device or backends.device()
    if dtype is None:
        dtype = torch.float32 if device == "cpu" else working_dtype(known.source)
    source = known.source
    try:
        if is_single_file(source):
            return _ready(_from_single_file(Path(source), dtype), device, offload)
        index = model_index(source)
        components = {}
        for name, entry in index.items():
            if isinstance(entry, list) and entry[0] is None:
                components[name] = None  # SD3 without its T5: diffusers wants to be told
            elif isinstance(entry, list) and entry[0] == ecodiff_sliced_v1.NAME:
                cls = getattr(ecodiff_sliced_v1, str(entry[1]))
                components[name] = cls.from_pretrained(source, subfolder=name, dtype=dtype)
        pipe = _from_files(source, dtype, components)
    except EcodiffError:
        raise
    except SafetensorError as error:
        raise _damaged(source, error) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, *NETWORK_ERRORS):
        raise _unreachable(source) from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise _damaged(source, error) from None
    return _ready(pipe, device, offload)


def _from_files(source: str, dtype: torch.dtype, components: dict):
    """The pipeline of a folder or repository. Many hold float32 weights and, as the variant "fp16", halves:
    of the two, what is nearer to `dtype` is read (and downloaded), or what is there."""
    plain: Exception | None = None
    for variant in ("fp16", None) if dtype.itemsize == 2 else (None, "fp16"):
        options = {"dtype": dtype, "use_safetensors": True, "variant": variant}
        try:
            return DiffusionPipeline.from_pretrained(source, **options, **components)
        except (LocalEntryNotFoundError, HfHubHTTPError):
            raise
        except (OSError, ValueError) as error:
            plain = error if variant is None else plain
    raise plain


def _ready(pipe, device: str, offload: bool):
    denoiser_of(pipe)
    parts = [part.eval() for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    if offload and device != "cpu" and weights > free_bytes(torch.device(device)):
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    words = f"The weights alone take {megabytes(weights)}. Take a smaller model, or a larger device."
    with memory_advice(words):
        return pipe.to(device)


def is_single_file(source: str) -> bool:
    """True for a checkpoint in one file."""
    return source.endswith(".safetensors") and os.path.isfile(source)


@cache
def base_of(source: str) -> str:
    """The Hub repository (or catalogue model) whose architecture a single file has, by its tensors.

    Raises:
        CheckpointError: not a safetensors file.
    """
    try:
        with safe_open(source, framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        return fetch_diffusers_config(empty)["pretrained_model_name_or_path"]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{source} is not a checkpoint that diffusers knows: {error}") from None


def _from_single_file(path: Path, dtype: torch.dtype):
    """The pipeline of a single file; what is not in it comes from the model that it is a variant of."""
    base = base_of(str(path))
    pipeline, name = classes(base)
    with safe_open(path, framework="pt") as file:
        whole = any(key.startswith(_OTHER_PARTS) for key in file.keys())  # noqa: SIM118
    if whole:
        return pipeline.from_single_file(str(path), config=base, torch_dtype=dtype)
    denoiser = getattr(diffusers, model_index(base)[name][1])
    own = denoiser.from_single_file(str(path), config=base, subfolder=name, torch_dtype=dtype)
    return pipeline.from_pretrained(base, dtype=dtype, use_safetensors=True, **{name: own})


def model_index(source: str) -> dict:
    """`model_index.json` of a folder or Hub repository. Downloads no weights.

    Raises:
        ModelNotFoundError, CheckpointError
    """
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "model_index.json")):
            raise CheckpointError(
                f"{source} has no model_index.json, so it is not a diffusers pipeline folder."
            )
    elif os.path.isabs(source) or source.startswith((".", "~")) or source.count("/") != 1:
        names = ", ".join(catalog.MODELS)
        raise ModelNotFoundError(
            f"There is no model {source!r}. Give one of {names}; a diffusers folder; or a Hub id "
            "such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    try:
        return DiffusionPipeline.load_config(source)
    except HFValidationError as error:
        raise ModelNotFoundError(f"{source!r} is not a Hub id: {error}") from None
    except NETWORK_ERRORS:
        raise _unreachable(source) from None
    except (OSError, ValueError) as error:
        if os.path.isdir(source):
            raise _damaged(source, error) from None
        raise _unreachable(source) from None


def empty_denoiser(source: str) -> nn.Module:
    """The denoiser of a model on the meta device: its shapes, without its weights.

    Raises:
        ModelNotFoundError, CheckpointError, UnsupportedModelError
    """
    # Not accelerate's init_empty_weights: that changes nn.Module for all threads, and for forks of theirs.
    known = catalog.find(source)
    if known.denoiser:
        with torch.device("meta"):
            return getattr(diffusers, known.denoiser["_class_name"]).from_config(known.denoiser)
    source = known.source
    if is_single_file(source):
        return empty_denoiser(base_of(source))
    index = model_index(source)
    name = next((n for n in ("unet", "transformer") if index.get(n, [None])[0]), None)
    if name is None:
        raise UnsupportedModelError(f"{source} has no `unet` and no `transformer` to prune.")
    library, cls_name = index[name]
    module = ecodiff_sliced_v1 if library == ecodiff_sliced_v1.NAME else diffusers
    cls = getattr(module, str(cls_name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise UnsupportedModelError(f"The {name} of {source} is a {cls_name}, not diffusers' own.")
    try:
        with torch.device("meta"):
            return cls.from_config(cls.load_config(source, subfolder=name))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, *NETWORK_ERRORS) as error:
        if os.path.isdir(source):
            raise _damaged(source, error) from None
        raise _unreachable(source) from None


def classes(source: str) -> tuple[type, str]:
    """The class of a model's pipeline, and the name of the denoiser in it; loads no weights."""
    source = catalog.find(source).source
    index = model_index(base_of(source) if is_single_file(source) else source)
    pipeline = getattr(diffusers, str(index.get("_class_name")), None)
    if not (isinstance(pipeline, type) and issubclass(pipeline, DiffusionPipeline)):
        raise UnsupportedModelError(f"{source} is a {index.get('_class_name')}, not diffusers' own.")
    return pipeline, "unet" if index.get("unet", [None])[0] else "transformer"


def disk_dtype(source: str) -> torch.dtype:
    """In which type a model's files hold the denoiser's weights, or `working_dtype` if they are not here."""
    source = catalog.find(source).source
    for name in ("unet", "transformer"):
        files = (Path(source) / name).glob("*.safetensors")
        for file in sorted(files, key=lambda file: ".fp16" not in file.name):
            with safe_open(file, framework="pt") as weights:
                return weights.get_tensor(next(iter(weights.keys()))).dtype
    return _sixteen_bits(source)


def working_dtype(source: str) -> torch.dtype:
    """In which type a model works on a GPU: that of its files, if it has 16 bits."""
    known = catalog.find(source)
    found = _WORDS[known.dtype] if known.name in catalog.MODELS else disk_dtype(source)
    return found if found.itemsize == 2 else _sixteen_bits(source)


def _sixteen_bits(source: str) -> torch.dtype:
    """The catalogue's type; else UNets are at home in float16, and transformers need bfloat16's range."""
    known = catalog.find(source)
    if known.name in catalog.MODELS:
        return _WORDS[known.dtype]
    return torch.float16 if classes(source)[1] == "unet" else torch.bfloat16


def _unreachable(source: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"Could not get {source} from the Hugging Face Hub: no network, no such repository, or no "
        "access (a gated model needs its licence accepted and a token). Check the id and the "
        "connection, or give a folder on this machine."
    )


def _damaged(source: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return CheckpointError(f"{source} could not be opened as a diffusers pipeline: {reason}")


def folder_bytes(folder: str | Path) -> int:
    """Size of all files in a folder, in bytes."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def save(pipe, folder: str | Path, dtype: torch.dtype | None = None, card: str = "") -> Path:
    """Write a pruned pipeline as a diffusers folder that opens without ecodiff.

    Written beside its place and moved there when complete: a full disk leaves nothing half done,
    and an existing folder is only replaced if ecodiff wrote it.

    Args:
        dtype: of the weights in the files; None: as they are in memory.
        card: text of the folder's README.md; empty: what `model_card` writes.

    Raises:
        UnsupportedModelError: the pipeline's denoiser has not been pruned.
        CheckpointError: the folder holds something else, or could not be written.
    """
    folder = Path(folder)
    plan = plan_of(denoiser_of(pipe))
    if plan is None:
        raise UnsupportedModelError(
            f"This {type(pipe).__name__} has not been pruned; save it with its own "
            "save_pretrained, or prune it first (ecodiff.variant)."
        )
    taken = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if taken and not (folder / PLAN_FILE).is_file():
        raise CheckpointError(f"{folder} exists and holds something else. Name a new or an empty folder.")
    # A denoiser that was sliced in place changed its class after the pipeline had noted it down.
    pipe.register_modules(**{denoiser_name(pipe): denoiser_of(pipe)})
    if dtype is not None and dtype != denoiser_of(pipe).dtype:
        pipe = _cast(pipe, dtype)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"Could not write {folder}: {error}.") from None
    try:
        pipe.save_pretrained(partial)
        open_in_one_dtype(partial)
        plan.save(partial / PLAN_FILE)
        (partial / "README.md").write_text(card or model_card(pipe), encoding="utf-8")
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Could not write {folder}: {error}. Is the disk full? Nothing was left there."
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def open_in_one_dtype(folder: Path) -> None:
    """Where no dtype is asked for, diffusers opens its models in float32, and transformers its own in the
    type that their config names: text encoders in half precision would meet a denoiser that is not."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if "dtype" in config:
            file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def _cast(pipe, dtype: torch.dtype):
    """A copy of `pipe` with weights in `dtype`; the modules it may share are not touched."""
    cast = {
        name: copy.deepcopy(component).to(dtype)
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
    }
    small = copy.copy(pipe)
    small.register_modules(**cast)
    return small


def model_card(pipe, facts: dict | None = None) -> str:
    """README.md of a pruned folder: what was removed, how to load it, the base model's licence."""
    name = denoiser_name(pipe)
    plan = plan_of(getattr(pipe, name))
    about = plan.metadata | (facts or {})
    base = about.get("model", "unknown")
    known = catalog.find(base)
    head = {"library_name": "diffusers", "license": known.licence, "tags": ["ecodiff", "pruned"]}
    if "/" in known.source and not known.embedded:
        head["base_model"] = known.source
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    dense, pruned = about.get("params_dense"), about.get("params_pruned")
    size = f"{dense:,} → {pruned:,} ({1 - pruned / dense:.1%} removed)" if dense else "see config"
    measured = "".join(f"| {key} | {value} |\n" for key, value in (facts or {}).items())
    return f"""---
{front}
---

# {base}, pruned with ecodiff

| | |
|---|---|
| parameters of the {name} | {size} |
| method | {about.get("method", "unknown")} |
| plan | `{plan.digest}` |
{measured}
```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("THIS FOLDER", trust_remote_code=True)
image = pipe("a prompt").images[0]
```

It opens in float32; on a GPU give `torch_dtype=torch.float16` (or `bfloat16`) as well.
`trust_remote_code` runs `{name}/{ecodiff_sliced_v1.NAME}.py`, which only gives the layers their
smaller shapes. With ecodiff {version("ecodiff") if _installed() else ""} installed,
`ecodiff.load("THIS FOLDER")` needs no remote code. The licence is the base model's.
"""


def _installed() -> bool:
    try:
        return bool(version("ecodiff"))
    except ModuleNotFoundError:
        return False
