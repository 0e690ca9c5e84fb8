"""What a folder or a repository says that it is: its index, read without weights."""

import json
import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import get_hf_file_metadata

from .. import catalog
from ..errors import CheckpointError, ModelNotFoundError
from ..pipelines import DENOISERS, SECOND_DENOISERS
from .sign_in import NETWORK_ERRORS, PROBE_SECONDS, hub_token, unreachable

_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".zip", ".json")
_NO_MODEL = "no model. Give a .safetensors file, a diffusers folder or a Hub id."
_PICKLE = "a pickle, which may run code when it is opened. Give the model as .safetensors."
_OTHER_FILES = dict.fromkeys((".ckpt", ".pt", ".pth", ".bin"), _PICKLE) | {
    ".gguf": "quantised (GGUF). Give the full-precision model; what is pruned can be quantised afterwards.",
    ".zip": "a zip. Unpack it and give the folder; a plan in it is imported in the Library, or by `import`.",
}


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
    elif os.path.isfile(source):
        raise CheckpointError(f"{source} is {_OTHER_FILES.get(Path(source).suffix, _NO_MODEL)}")
    elif (
        Path(source).suffix in _FILES
        or os.path.isabs(source)
        or source.startswith((".", "~"))
        or source.count("/") != 1
    ):
        names = ", ".join(catalog.MODELS)
        raise ModelNotFoundError(
            f"There is no model {source!r}. Give one of {names}; a diffusers folder; or a Hub id "
            "such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    if not os.path.isdir(source):
        probe(source)
    try:
        return DiffusionPipeline.load_config(source, token=hub_token())
    except HFValidationError as error:
        raise ModelNotFoundError(f"{source!r} is not a Hub id: {error}") from None
    except NETWORK_ERRORS:
        raise unreachable(source) from None
    except (OSError, ValueError) as error:
        if os.path.isdir(source):
            raise damaged(source, error) from None
        raise unreachable(source) from None


def probe(repo: str) -> None:
    """Ask the Hub once, for a few seconds, before its client asks for most of a minute.

    Raises:
        ModelNotFoundError: it cannot be reached, and the repository is not in the cache.
    """
    if isinstance(try_to_load_from_cache(repo, "model_index.json"), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, "model_index.json"), token=hub_token(), timeout=PROBE_SECONDS)
    except NETWORK_ERRORS:
        raise unreachable(repo) from None
    except (OSError, ValueError):  # it answered: what is wrong is told by who reads the file
        return


def refuse_quantised(source: str, index: dict) -> None:
    """Raise CheckpointError if the denoiser in a folder is stored quantised."""
    for name in (*DENOISERS, *SECOND_DENOISERS):
        file = Path(source) / name / "config.json"
        if name in index and file.is_file():
            found = json.loads(file.read_text(encoding="utf-8")).get("quantization_config")
            if found:
                raise CheckpointError(
                    f"The {name} of {source} is stored quantised ({found.get('quant_method', 'unknown')}). "
                    "Give the full-precision model; what is pruned can be quantised afterwards."
                )


def damaged(source: str, error: Exception) -> CheckpointError:
    """The error of a folder that cannot be opened."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return CheckpointError(f"{source} could not be opened as a diffusers pipeline: {reason}")
