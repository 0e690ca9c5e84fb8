"""What a person can do on the page or over the API, in plain arguments and plain results.

The id of a run is its only key: whoever has it may watch, cut, compare and download that run.
"""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from . import catalog, checkpoint
from .errors import BudgetError, CheckpointError, ModelNotFoundError, RunError
from .fidelity import Sample, fidelity, generate
from .gpu import DEVICE, PIPELINES
from .groups import PRESET_KINDS, denoiser_of
from .jobs import WORKER
from .plan import PrunePlan
from .runs import Run, RunStore
from .scores import Scores
from .slicing import plan_of

STORE = RunStore()
EXPIRY_SECONDS = 24 * 3600  # on a Space; at home runs are kept


@cache
def _sizes(model: str, kinds: tuple[str, ...] = PRESET_KINDS) -> tuple[Scores, int, int]:
    """Unit costs of a model, bytes of a weight in its files, bytes of all its weights."""
    denoiser = checkpoint.empty_denoiser(model)
    scores = Scores.unranked(denoiser, kinds)
    itemsize = (checkpoint.disk_dtype(model) or torch.float16).itemsize
    source = Path(catalog.find(model).source)
    weights = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    return scores, itemsize, weights or scores.total * itemsize


def _known(model: str) -> catalog.Model:
    """The model of that name. On a Space, visitors name models, not folders of the server."""
    known = catalog.find(model)
    if os.environ.get("SPACE_ID") and not known.embedded and Path(model).is_dir():
        raise ModelNotFoundError(f"There is no model {model!r}. Give an embedded model or a Hub id.")
    return known


def predict(model: str, ratio: float) -> dict:
    """What pruning will leave, by arithmetic on the model's configuration.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove.

    Returns:
        {"params_dense", "params_pruned", "bytes_dense", "bytes_pruned", "ceiling"}
    """
    scores, itemsize, dense_bytes = _sizes(_known(model).name)
    removed = round(_checked(ratio, scores) * scores.total)
    return {
        "params_dense": scores.total,
        "params_pruned": scores.total - removed,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - removed * itemsize,
        "ceiling": scores.ceiling,
    }


def _checked(ratio: float, scores: Scores) -> float:
    if not 0 < ratio <= scores.ceiling:
        raise BudgetError(
            f"Between 0 and {scores.ceiling:.1%} of this model's parameters can be removed (the rest "
            f"is not in {scores.kinds_in_words}); {ratio:.1%} was asked for."
        )
    return ratio


def start(
    model: str,
    ratio: float = 0.2,
    preset: str = "fast",
    seed: int = 0,
    kinds: Sequence[str] | None = None,
) -> dict:
    """Start learning which units of a model matter. Returns the status of the new run.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove; learning steers to it.
        preset: "fast", "balanced", "paper" or "ecodiff" (as published).
        seed: of prompts, noise and gates.
        kinds: which units may go, of "heads", "ffn", "resnet", "modulation"; None: the preset's.
    """
    known = _known(model)
    changes = {"kinds": tuple(kinds)} if kinds and set(kinds) != set(PRESET_KINDS) else {}
    config = known.learn_config(preset, ratio, seed=int(seed), **changes)
    _checked(ratio, _sizes(known.name, config.kinds)[0])
    if os.environ.get("SPACE_ID"):
        STORE.sweep(EXPIRY_SECONDS)
    prompts = known.prompts("calibration")
    run = Run.create(STORE.new_folder(), model, config, prompts, preset)
    WORKER.submit(run)
    return status(run.id)


def status(run: str) -> dict:
    """Where a run is.

    Returns:
        {"run", "model", "preset", "name", "created", "ratio", "stage", "step", "steps", "ahead",
        "seconds_left": measured, or None, "error", "history": one dict a step}; stage is queued,
        loading, learning, calibrating, finished, stopped, failed, or interrupted (the server was restarted).
    """
    opened = STORE.open(run)
    job = WORKER.job(run)
    state = job.state if job and job.state else opened.state()
    step = state.step if state else 0
    stage = job.stage if job else "interrupted"
    if not job and step >= opened.config.total_steps:
        stage = "finished"
    elif not job and opened.stop_requested:
        stage = "stopped"
    return {
        "run": run,
        "model": opened.model,
        "preset": opened.preset,
        "name": opened.name,
        "created": opened.created,
        "ratio": opened.config.ratio,
        "stage": stage,
        "step": step,
        "steps": opened.config.total_steps,
        "warm_steps": opened.config.warm_steps,
        "ahead": WORKER.ahead(job) if job else 0,
        "seconds_left": job.seconds_left if job and job.active else None,
        "error": opened.error,
        "history": state.history if state else [],
    }


def stop(run: str) -> dict:
    """Ask a run to stop. It does so within one time step and can be resumed."""
    WORKER.stop(STORE.open(run))
    return status(run)


def resume(run: str) -> dict:
    """Go on with a run that was stopped, failed or interrupted."""
    opened = STORE.open(run)
    if not opened.finished:
        WORKER.submit(opened)
    return status(run)


def rename(run: str, name: str) -> dict:
    """Give a run a name of up to 60 characters."""
    opened = STORE.open(run)
    opened.name = " ".join(str(name).split())[:60]
    opened.save()
    return status(run)


def plan(run: str, ratio: float) -> PrunePlan:
    """The plan of a run at a size. Milliseconds: nothing is learned again."""
    opened = STORE.open(run)
    if not (opened.folder / "scores.safetensors").exists():
        raise RunError("This run has no scores yet. Let it learn for a few steps first.")
    cut = opened.scores().plan(ratio=ratio)
    cut.metadata |= {"model": opened.model}
    return cut


def cut(run: str, ratio: float) -> dict:
    """Cut a run's ranking at a size.

    Returns:
        {"digest", "ratio", "params_dense", "params_pruned", "bytes_dense", "bytes_pruned",
        "units_removed", "units", "kept": {group: fraction kept}}
    """
    made = plan(run, ratio)
    _, itemsize, dense_bytes = _sizes(made.metadata["model"])
    dense, pruned = made.metadata["params_dense"], made.metadata["params_pruned"]
    return {
        "digest": made.digest,
        "ratio": 1 - pruned / dense,
        "params_dense": dense,
        "params_pruned": pruned,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - (dense - pruned) * itemsize,
        "units_removed": sum(int((~keep).sum()) for keep in made.values()),
        "units": sum(len(keep) for keep in made.values()),
        "kept": {name: float(keep.float().mean()) for name, keep in made.items()},
    }


def compare(
    run: str,
    ratio: float,
    prompt: str,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    compensate: bool = True,
) -> tuple[Sample, Sample, dict]:
    """Draw one prompt with the dense and the pruned model, from the same noise, and measure.

    Args:
        compensate: let the weights that remain take over from those that went (closed form).

    Returns:
        dense sample, pruned sample, and `cut`'s result with latent_error, psnr, ssim, ms_dense,
        ms_pruned: milliseconds for this image, after a warm-up
    """
    made, facts = plan(run, ratio), cut(run, ratio)
    known = catalog.find(made.metadata["model"])
    if not prompt.strip():
        raise BudgetError("Write a prompt first: what should be drawn?")
    options = known.drawing(int(steps) if steps else None, guidance_scale)
    with DEVICE:
        dense = PIPELINES.dense(made.metadata["model"])
        small = PIPELINES.pruned(made.metadata["model"], made, compensate)
        samples = []
        for pipe in (dense, small):
            generate(pipe, prompt, int(seed), **(options | {"steps": 2}))  # warm-up
            samples.append(generate(pipe, prompt, int(seed), **options))
    facts |= asdict(fidelity(*samples))
    facts |= {"ms_dense": samples[0].milliseconds, "ms_pruned": samples[1].milliseconds}
    return *samples, facts


def export(run: str, ratio: float, compensate: bool = True) -> dict:
    """Write the pruned pipeline folder of a run at a size, as one zip file.

    Args:
        compensate: let the weights that remain take over from those that went (closed form).

    Returns:
        {"path", "name", "bytes", "sha256", "folder"}
    """
    made, opened = plan(run, ratio), STORE.open(run)
    model = made.metadata["model"].rpartition("/")[2]
    name = f"{model}-eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}"
    name += "" if compensate else "-uncompensated"
    path = opened.folder / "models" / f"{name}.zip"
    with DEVICE:
        if not path.exists():
            small = PIPELINES.pruned(made.metadata["model"], made, compensate)
            assert plan_of(denoiser_of(small)).digest == made.digest
            dtype = checkpoint.disk_dtype(made.metadata["model"])
            folder = checkpoint.save(small, opened.folder / "models" / name, dtype)
            _zip(folder, path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {
        "path": str(path),
        "name": path.name,
        "folder": name,
        "bytes": path.stat().st_size,
        "sha256": digest.hexdigest(),
    }


def _zip(folder: Path, path: Path) -> None:
    partial = path.with_suffix(".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"Could not pack the checkpoint: {error}. Is the disk full?") from None


def plan_file(run: str, ratio: float) -> str:
    """Write the plan file of a run at a size; returns its path."""
    made = plan(run, ratio)
    name = f"eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}.safetensors"
    return str(made.save(STORE.open(run).folder / "plans" / name))
