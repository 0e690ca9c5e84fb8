"""What a person can do on the page or over the API, in plain arguments and plain results.

The id of a run is its only key: whoever has it may watch, cut, compare and download that run.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from torch import nn

from . import backends, catalog, checkpoint, gpu, memory
from .errors import BudgetError, CheckpointError, ModelNotFoundError, RunError
from .fidelity import Sample, fidelity
from .groups import ALL_KINDS, PRESET_KINDS, find_groups, unrecognised
from .jobs import WORKER
from .lora import save_lora, translate
from .plan import PrunePlan
from .runs import STORE, Run
from .scores import Scores

EXPIRY_SECONDS = 24 * 3600  # on a Space; at home runs are kept


@cache
def _denoiser(model: str) -> nn.Module:
    return checkpoint.empty_denoiser(model)


@cache
def _sizes(model: str, kinds: tuple[str, ...] = PRESET_KINDS) -> tuple[Scores, int, int]:
    """Unit costs of a model, bytes of a weight in its files, bytes of all its weights."""
    scores = Scores.unranked(_denoiser(model), kinds)
    itemsize = (checkpoint.disk_dtype(model) or torch.float16).itemsize
    source = Path(catalog.find(model).source)
    weights = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    return scores, itemsize, weights or scores.total * itemsize


def _known(model: str) -> catalog.Model:
    """The model of that name. On a Space, visitors name models, not folders of the server."""
    known = catalog.find(model)
    if os.environ.get("SPACE_ID") and not known.embedded and Path(known.source).exists():
        raise ModelNotFoundError(f"There is no model {model!r}. Give an embedded model or a Hub id.")
    return known


def predict(model: str, ratio: float) -> dict:
    """What pruning will leave, by arithmetic on the model's configuration.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove.

    Returns:
        {"params_dense", "params_pruned", "bytes_dense", "bytes_pruned", "ceiling", "licence", "gated",
        "supported": what the conformance suite passes of this architecture, "memory": {"draw", "learn"},
        bytes, an estimate, "left_alone": {class: parameters that no unit holds}}
    """
    known = _known(model)
    scores, itemsize, dense_bytes = _sizes(known.name)
    denoiser = _denoiser(known.name)
    removed = round(_checked(ratio, scores) * scores.total)
    return {
        "params_dense": scores.total,
        "params_pruned": scores.total - removed,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - removed * itemsize,
        "ceiling": scores.ceiling,
        "licence": known.licence,
        "gated": known.gated,
        "supported": catalog.supported(type(denoiser).__name__),
        "memory": memory.estimate(denoiser, known),
        "left_alone": unrecognised(denoiser, find_groups(denoiser, ALL_KINDS)),
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
    if not backends.zerogpu():
        WORKER.submit(run)
    return status(run.id)


def learn(run: str) -> Iterator[dict]:
    """Go on learning, where nothing does so by itself: on ZeroGPU, for one call of about a minute.

    Call it again while the stage is "interrupted" or "calibrating". Elsewhere a worker learns, and this only
    says where it is.

    Yields:
        what `status` returns, after every step
    """
    opened = STORE.open(run)
    done = opened.finished and gpu.calibrated(opened.model)
    if backends.zerogpu() and not opened.stop_requested and not done:
        paces = []
        for step in gpu.results("learn", str(opened.folder)):
            paces.append(step["seconds"])
            left = opened.config.total_steps - step["step"]
            pace = {"seconds_left": left * sum(paces[-8:]) / len(paces[-8:]) if left else None}
            yield status(run) | {"stage": "learning" if left else "calibrating"} | pace
    yield status(run)


def status(run: str) -> dict:
    """Where a run is.

    Returns:
        {"run", "model", "preset", "name", "created", "ratio", "stage", "step", "steps", "ahead",
        "seconds_left": measured, or None, "error", "memory", "history": one dict a step}; stage is queued,
        loading, learning, calibrating, finished, stopped, failed, or interrupted (nothing works on it: the
        server was restarted or, on ZeroGPU, `learn` is to be called).
    """
    opened = STORE.open(run)
    job = WORKER.job(run)
    state = job.state if job and job.state else opened.state()
    step = state.step if state else 0
    stage = job.stage if job else _stage(opened, step)
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
        "memory": opened.memory,
        "history": state.history if state else [],
    }


def _stage(run: Run, step: int) -> str:
    """The stage of a run that no job of this process is about: by what is on disk."""
    if step >= run.config.total_steps:
        given_up = run.error or run.stop_requested  # the first image will take longer
        return "finished" if given_up or gpu.calibrated(run.model) else "calibrating"
    if run.busy:
        return "learning"
    if run.error:
        return "failed"
    return "stopped" if run.stop_requested else "interrupted"


def fail(run: str, message: str) -> dict:
    """Keep with a run why it could not go on; it can be resumed. Returns its status."""
    STORE.open(run).record(message)
    return status(run)


def stop(run: str) -> dict:
    """Ask a run to stop. It does so within one time step and can be resumed."""
    WORKER.stop(STORE.open(run))
    return status(run)


def resume(run: str) -> dict:
    """Go on with a run that was stopped, failed or interrupted."""
    opened = STORE.open(run)
    if backends.zerogpu():
        opened.permit()
        opened.forget_error()
    elif not opened.finished:
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
    kept = str(STORE.open(run).folder / "variants")
    (samples,) = gpu.results("draw", known.name, made, prompt, int(seed), options, compensate, kept)
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
    model = made.metadata["model"]
    name = f"{model.rpartition('/')[2]}-eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}"
    name += "" if compensate else "-uncompensated"
    path = opened.folder / "models" / f"{name}.zip"
    if not path.exists():
        (folder,) = gpu.results(
            "pack", model, made, compensate, str(opened.folder / "variants"), str(path.with_suffix(""))
        )
        _zip(Path(folder), path)
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


def lora(run: str, ratio: float, file: str) -> dict:
    """Cut a LoRA of the dense model to fit the pruned model of a run at a size.

    Args:
        file: path of a .safetensors file in diffusers', PEFT's or kohya's naming.

    Returns:
        {"path", "name", "report": what was done, in words, "dropped": {layer: why}}
    """
    made, folder = plan(run, ratio), STORE.open(run).folder / "loras"
    known = catalog.find(made.metadata["model"])
    pipeline, component = checkpoint.classes(known.name)
    tensors, report = translate(file, pipeline, component, made, _denoiser(known.name))
    name = f"{Path(file).stem[:60]}-eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}.safetensors"
    path = save_lora(tensors, folder / name, made)
    return {"path": str(path), "name": name, "report": report.words(), "dropped": report.dropped}


def plan_file(run: str, ratio: float) -> str:
    """Write the plan file of a run at a size; returns its path."""
    made = plan(run, ratio)
    name = f"eco{round(100 * made.metadata['ratio'])}-{made.digest[:8]}.safetensors"
    return str(made.save(STORE.open(run).folder / "plans" / name))
