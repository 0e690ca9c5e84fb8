"""Runs: predicted, started, watched, stopped, resumed, named."""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import nn

from ... import catalog, machine
from ...architectures import find_groups, unrecognised
from ...checkpoints import hub, loading
from ...checkpoints.formats import FORMATS
from ...checks import check_class
from ...config import LearnConfig
from ...errors import BudgetError, ModelNotFoundError, RunError
from ...learning import memory
from ...learning.methods import METHODS, measured_best
from ...pruning.scores import Scores
from ...runs.folder import Run
from ...runs.importing import import_run
from ...units import ALL_KINDS, PRESET_KINDS
from .. import limits
from ..server import server
from ..tasks import LearnRun, results
from ..worker import Job

Seed = Annotated[int, Field(ge=0, lt=2**31)]

EXPIRY_SECONDS = 24 * 3600  # on a Space; at home runs are kept
CALLS_A_STEP = 3  # denoiser calls of a time step: recorded, differentiated, computed again


@cache
def empty_denoiser(model: str) -> nn.Module:
    """A model's denoiser without weights, on the meta device."""
    return loading.empty_denoiser(model)


@cache
def unit_costs(model: str, kinds: tuple[str, ...] = PRESET_KINDS) -> tuple[Scores, int, int]:
    """Unit costs of a model, bytes of a weight in its files, bytes of all its weights."""
    scores = Scores.unranked(empty_denoiser(model), kinds)
    itemsize = loading.disk_dtype(model).itemsize
    source = Path(catalog.find(model).source)
    weights = sum(file.stat().st_size for file in source.rglob("*.safetensors"))
    return scores, itemsize, weights or scores.total * itemsize


def _known(model: str) -> catalog.Model:
    """The model of that name. On a Space, visitors name models, not folders of the server."""
    known = catalog.find(model)
    if os.environ.get("SPACE_ID") and not known.embedded and Path(known.source).exists():
        raise ModelNotFoundError(f"There is no model {model!r}. Give an embedded model or a Hub id.")
    return known


def predict(model: str, ratio: float, preset: str = "fast", kinds: list[str] | None = None) -> dict:
    """What pruning will leave, by arithmetic on the model's configuration.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove.
        preset, kinds: as `start` takes them: what may go.

    Returns:
        {"params_dense", "params_pruned", "bytes_dense", "bytes_pruned", "ceiling": share of the parameters
        that can go at most, "units": what holds those, in words, "licence", "gated",
        "supported": what the conformance suite passes of this architecture, "memory": {"draw", "learn",
        "here"}, bytes: estimates of what it takes, and what the device has, "left_alone": {class: parameters
        that no unit holds}}
    """
    known = _known(model)
    wanted = LearnConfig.preset(preset, **{"kinds": tuple(kinds)} if kinds else {}).kinds
    scores, itemsize, dense_bytes = unit_costs(known.name, wanted)
    denoiser = empty_denoiser(known.name)
    removed = round(_checked(ratio, scores) * scores.total)
    device = torch.device(machine.device())
    footprint = known.footprint(4 if device.type == "cpu" else None)
    return {
        "params_dense": scores.total,
        "params_pruned": scores.total - removed,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - removed * itemsize,
        "ceiling": scores.ceiling,
        "units": scores.kinds_in_words.replace(" or ", ", "),
        "licence": known.licence,
        "gated": known.gated,
        "supported": catalog.supported(type(denoiser).__name__),
        "memory": memory.estimate(denoiser, **footprint) | {"here": machine.capacity(device)},
        "left_alone": unrecognised(denoiser, find_groups(denoiser, ALL_KINDS)),
    }


def methods() -> list[tuple[str, str]]:
    """Other ways to rank units than a preset's: (what it is, its name), as `start` takes for a preset."""
    return [(f"{method.name}: {method.source}", method.name) for method in METHODS.values()]


def formats() -> list[tuple[str, str]]:
    """Ways to export: (what it is, its name), as `export` takes."""
    return [(f"{entry.name}: {entry.words}", entry.name) for entry in FORMATS.values()]


def default_preset(model: str) -> str:
    """The preset that a model is best learned with here, as far as that is measured.

    On ZeroGPU, where a call is short, one that learns step by step.
    """
    known = _known(model)
    return "fast" if machine.zerogpu() else measured_best(empty_denoiser(known.name), "fast")


def kinds_of(preset: str) -> tuple[str, ...]:
    """The kinds of units that a preset prunes."""
    return LearnConfig.preset(preset).kinds


def _checked(ratio: float, scores: Scores) -> float:
    if not 0 < ratio <= scores.ceiling:
        raise BudgetError(
            f"Between 0 and {scores.ceiling:.1%} of this model's parameters can be removed (the rest "
            f"is not in {scores.kinds_in_words}); {ratio:.1%} was asked for."
        )
    return ratio


def start(
    model: str = "emoji-sdxl",
    ratio: float = 0.2,
    preset: str = "fast",
    seed: Seed = 0,
    kinds: list[str] | None = None,
) -> dict:
    """Start learning which units of a model matter. Returns the status of the new run.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove; learning steers to it.
        preset: "fast", "balanced", "paper", "ecodiff" (as published), or a scoring method ("wanda", ...).
        seed: of prompts, noise and gates.
        kinds: which units may go, of "heads", "ffn", "resnet", "modulation"; None: the preset's.
    """
    known = _known(model)
    changes = {"kinds": tuple(kinds)} if kinds else {}
    check_class(loading.classes(known.name)[0])
    config = known.learn_config(preset, ratio, seed=int(seed), **changes)
    _checked(ratio, unit_costs(known.name, config.kinds)[0])
    if os.environ.get("SPACE_ID"):
        server().store.sweep(EXPIRY_SECONDS)
    limits.require_room(learning=True)
    prompts = known.prompts("calibration")
    run = Run.create(server().store.new_folder(), model, config, prompts, preset)
    limits.admit(run)
    if not machine.zerogpu():
        try:
            server().worker.submit(run)
        except RunError:  # refused: nothing is left of it
            server().store.delete(run)
            raise
    return status(run.id)


def import_(model: str, files: Sequence[str] = (), repo: str = "", token: str = "") -> dict:
    """Open what was learned elsewhere as a run: nothing is learned again. Returns its status.

    Args:
        model: embedded name, folder or Hub id of the dense model.
        files: paths of a plan file (.safetensors), or of the zip of a pruned model; or of EcoDiff's
            published masks (.pt), of heads, of neurons, or both.
        repo: instead of files, the Hub id of a plan or a pruned model.
        token: to read `repo` with; empty: as anybody may. The server's own is not used.
    """
    known = _known(model)
    limits.require_room()
    if repo.strip():
        files = [str(hub.pull_plan(repo.strip(), token or False))]
    config = known.learn_config("fast", 0.2)
    run = import_run(server().store.new_folder(), known.name, config, files)
    limits.admit(run)
    return status(run.id)


def learn(run: str) -> Iterator[dict]:
    """Go on learning, where nothing does so by itself: on ZeroGPU, for one call of about a minute.

    Call it again while the stage is "interrupted" or "calibrating". Elsewhere a worker learns, and this only
    says where it is.

    Yields:
        what `status` returns, after every step
    """
    opened = server().store.open(run)
    done = opened.finished and server().devices.calibrated(opened.model)
    if machine.zerogpu() and not opened.stop_requested and not done:
        paces = []
        for step in results(LearnRun(str(opened.folder))):
            paces.append(step["seconds"])
            left = opened.config.total_steps - step["step"]
            pace = {"seconds_left": left * sum(paces[-8:]) / len(paces[-8:]) if left else None}
            yield status(run) | {"stage": "learning" if left else "calibrating"} | pace
    yield status(run)


def status(run: str) -> dict:
    """Where a run is.

    Returns:
        {"run", "model", "preset", "name", "created", "expires": seconds since 1970, or None, "ratio",
        "size": the one ratio of a run made of a plan, or None where any can be cut,
        "stage", "step", "steps", "share": of the one step of a ranking method, or None, "ahead",
        "seconds_left": measured, or None, "error", "memory", "history": one dict a step}; stage is queued,
        loading, learning, calibrating, finished, stopped, failed, or interrupted (nothing works on it: the
        server was restarted or, on ZeroGPU, `learn` is to be called).
    """
    opened = server().store.open(run)
    job = server().worker.job(run)
    state = job.state if job and job.state else opened.state()
    step = opened.config.total_steps if opened.imported else state.step if state else 0
    stage = job.stage if job else _stage(opened, step)
    return {
        "run": run,
        "model": opened.model,
        "preset": opened.preset,
        "name": opened.name,
        "created": opened.created,
        "expires": opened.touched + EXPIRY_SECONDS if os.environ.get("SPACE_ID") else None,
        "ratio": opened.config.ratio,
        "size": opened.size,
        "stage": stage,
        "step": step,
        "steps": opened.config.total_steps,
        "warm_steps": opened.config.warm_steps,
        "share": _share(job) if job else None,
        "ahead": server().worker.ahead(job) if job else 0,
        "seconds_left": job.seconds_left if job and job.active else None,
        "error": opened.error,
        "memory": opened.memory,
        "history": state.history if state else [],
    }


def _share(job: Job) -> float | None:
    """Of a method that ranks in one step, how much is done: denoiser calls of those that it takes."""
    config = job.run.config
    method = METHODS.get(config.method or "")
    if method is None or not method.wide or not job.active:
        return None
    steps = (config.inference_steps or 50) * config.warm_steps * CALLS_A_STEP
    return min(1.0, job.run.calls / steps)


def _stage(run: Run, step: int) -> str:
    """The stage of a run that no job of this process is about: by what is on disk."""
    if step >= run.config.total_steps:
        unasked = run.imported or run.error or run.stop_requested  # the first image will take longer
        return "finished" if unasked or server().devices.calibrated(run.model) else "calibrating"
    if run.busy:
        return "learning"
    if run.error:
        return "failed"
    return "stopped" if run.stop_requested else "interrupted"


def fail(run: str, message: str) -> dict:
    """Keep with a run why it could not go on; it can be resumed. Returns its status."""
    server().store.open(run).record(message)
    return status(run)


def stop(run: str) -> dict:
    """Ask a run to stop. It does so within one time step and can be resumed."""
    server().worker.stop(server().store.open(run))
    return status(run)


def resume(run: str) -> dict:
    """Go on with a run that was stopped, failed or interrupted."""
    opened = server().store.open(run)
    if machine.zerogpu():
        opened.permit()
        opened.forget_error()
    elif not opened.finished:
        server().worker.submit(opened)
    return status(run)


def delete(run: str) -> dict:
    """Delete a run and all its files. Raises RunError while something works on it.

    Returns:
        {"deleted": its id}
    """
    opened, job = server().store.open(run), server().worker.job(run)
    if opened.busy or (job and job.active):
        raise RunError("The run is being worked on. Stop it first, then delete it.")
    server().store.delete(opened)
    return {"deleted": run}


def rename(run: str, name: str) -> dict:
    """Give a run a name of up to 60 characters."""
    opened = server().store.open(run)
    opened.name = " ".join(str(name).split())[:60]
    opened.save()
    return status(run)
