"""Writing pruned pipelines: diffusers folders of safetensors and JSON only."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from torch import nn

from ..checks import check_layers
from ..errors import CheckpointError, UnsupportedModelError
from ..pipelines import denoiser_name, denoiser_of
from ..pruning.components import plan_of_pipeline
from ..pruning.plan import PLAN_FILE, PrunePlan
from .card import model_card


def folder_bytes(folder: str | Path) -> int:
    """Size of all files in a folder, in bytes; of one that is written to, as it is found."""
    total = 0
    for file in Path(folder).rglob("*"):
        with suppress(FileNotFoundError):  # a partial file that was moved to its place meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def save(
    pipe: DiffusionPipeline, folder: str | Path, dtype: torch.dtype | None = None, card: str = ""
) -> Path:
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
    check_layers(denoiser_of(pipe))
    plan = pruned_by(pipe)
    # A denoiser that was sliced in place changed its class after the pipeline had noted it down.
    cut = {name: getattr(pipe, name) for name in plan.text_encoders}
    pipe.register_modules(**{denoiser_name(pipe): denoiser_of(pipe)}, **cut)
    if dtype is not None and dtype != denoiser_of(pipe).dtype:
        pipe = cast(pipe, dtype)
    return write(pipe, folder, plan, card or model_card(pipe))


def pruned_by(pipe: DiffusionPipeline) -> PrunePlan:
    """The plan that a pipeline was cut by. Raises UnsupportedModelError if it has not been pruned."""
    plan = plan_of_pipeline(pipe)
    if plan is None:
        raise UnsupportedModelError(
            f"This {type(pipe).__name__} has not been pruned; save it with its own "
            "save_pretrained, or prune it first (ecodiff.variant)."
        )
    return plan


def write(
    pipe: DiffusionPipeline,
    folder: str | Path,
    plan: PrunePlan,
    card: str,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a pipeline that was cut by `plan`, whatever its weights are stored in, as `save` does.

    Args:
        finish: called with the written folder before it is moved to its place.
    """
    asked = Path(folder)
    folder = asked.resolve()  # a link means what it leads to
    taken = folder.exists() and (folder.is_file() or any(folder.iterdir()))
    if taken and not (folder / PLAN_FILE).is_file():
        raise CheckpointError(f"{folder} exists and holds something else. Name a new or an empty folder.")
    with whole_folder(folder) as partial:
        pipe.save_pretrained(partial)
        open_in_one_dtype(partial)
        plan.save(partial / PLAN_FILE)
        (partial / "README.md").write_text(card, encoding="utf-8")
        finish(partial)
    return asked


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, beside `folder`; moved there, in its place, once it is complete.

    Raises:
        CheckpointError: it could not be written; nothing is left, and what was there is as it was.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(f"Could not write {folder}: {error}.") from None
    try:
        yield partial
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


def open_in_one_dtype(folder: Path) -> None:
    """Where no dtype is asked for, diffusers opens its models in float32, and transformers its own in the
    type that their config names: text encoders in half precision would meet a denoiser that is not."""
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if "dtype" in config:
            file.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def cast(pipe: DiffusionPipeline, dtype: torch.dtype):
    """A copy of `pipe` with weights in `dtype`; the modules it may share are not touched."""
    cast = {
        name: copy.deepcopy(component).to(dtype)
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module)
    }
    small = copy.copy(pipe)
    small.register_modules(**cast)
    return small
