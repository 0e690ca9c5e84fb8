"""Runs: predicted, started, watched, stopped, resumed, named."""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field

from ... import catalog, machine
from ...checkpoints import hub, loading
from ...checkpoints.saving import folder_bytes
from ...checkpoints.sign_in import signed_in
from ...checks import check_class
from ...errors import RunError
from ...learning.learn import measured_orders
from ...learning.methods import METHODS
from ...learning.progress import Progress
from ...runs.examples import EXAMPLES, example_of
from ...runs.folder import Run
from ...runs.importing import import_run
from ...runs.loop import PROGRESS
from ...runs.pictures import load
from ...runs.prompts import parse, set_aside
from .. import limits
from ..server import server
from ..tasks import LearnRun, results
from ..worker import Job
from .prediction import checked_ratio, permitted_model, require_memory, unit_costs

Seed = Annotated[int, Field(ge=0, lt=2**31)]

EXPIRY_SECONDS = 24 * 3600  # on a Space; at home runs are kept
CALIBRATION_STEPS = 3  # of learning, that recording takes as long as, while it was not measured


def start(
    model: str = "emoji-sdxl",
    ratio: float = 0.2,
    preset: str = "fast",
    seed: Seed = 0,
    kinds: list[str] | None = None,
    prompts: list[str] | None = None,
    token: str = "",
    text_encoders: float = 0.0,
) -> dict:
    """Start learning which units of a model matter. Returns the status of the new run.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove; learning steers to it.
        preset: "fast", "balanced", "paper", "ecodiff" (as published), "thorough" (surgeon on four times the
            trajectories), or a scoring method ("surgeon", "wanda", ...).
        seed: of prompts, noise and gates.
        kinds: which units may go, of "heads", "ffn", "resnet", "modulation"; None: the preset's.
        prompts: to learn and to repair on, in place of ecodiff's; of ten or more, a fifth is set aside to
            judge by.
        token: of the Hugging Face Hub, to fetch a gated or private model with; kept in memory for as long as
            the run is at work. Empty: this machine's own.
        text_encoders: fraction of the parameters of its text encoders to remove as well, ranked by the
            embeddings that they give.
    """
    known = permitted_model(model, token)
    own, heldout = set_aside(parse("\n".join(prompts))) if prompts else (None, ())
    changes: dict = {"text_encoders": text_encoders} | ({"kinds": tuple(kinds)} if kinds else {})
    with signed_in(token):
        check_class(loading.classes(known.name)[0])
        config = known.learn_config(preset, ratio, seed=int(seed), **changes)
        checked_ratio(ratio, unit_costs(known.name, config.kinds)[0])
        require_memory(known.name)
    if os.environ.get("SPACE_ID"):
        server().store.sweep(EXPIRY_SECONDS)
    limits.require_room(learning=True)
    learned_on = own or known.prompts("calibration")
    run = Run.create(server().store.new_folder(), model, config, learned_on, preset, heldout)
    limits.admit(run)
    if not machine.zerogpu():
        try:
            server().worker.submit(run, token)
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
        token: of the Hub, to read `repo` and the model with; empty: as anybody may. The server's own is not
            used for `repo`.
    """
    known = permitted_model(model, token)
    limits.require_room()
    if repo.strip():
        files = [str(hub.pull_plan(repo.strip(), token or False))]
    with signed_in(token):
        config = known.learn_config("fast", 0.2)
        run = import_run(server().store.new_folder(), known.name, config, files)
    limits.admit(run)
    return status(run.id)


def learn(run: str, token: str = "") -> Iterator[dict]:
    """Go on learning, where nothing does so by itself: on ZeroGPU, for one call of about a minute.

    Call it again while the stage is "interrupted" or "calibrating". Elsewhere a worker learns, and this only
    says where it is.

    Args:
        token: as `start` takes it.

    Yields:
        what `status` returns, after every step
    """
    opened = server().store.open(run)
    done = opened.finished and server().devices.calibrated(opened)
    if machine.zerogpu() and not opened.stop_requested and not done:
        paces = []
        for step in results(LearnRun(str(opened.folder), token)):
            paces.append(step["seconds"])
            left = opened.config.total_steps - step["step"]
            pace = {"seconds_left": left * sum(paces[-8:]) / len(paces[-8:]) if left else None}
            yield status(run) | {"stage": "learning" if left else "calibrating"} | pace
    yield status(run)


def status(run: str) -> dict:
    """Where a run is.

    Returns:
        {"run", "model", "preset", "name", "created", "expires": seconds since 1970, or None, "ratio",
        "drawing": True while pictures of the finished run are drawn,
        "size": the one ratio of a run made of a plan, or None where any can be cut,
        "stage", "step", "steps", "share": of the one step of a ranking method, or None, "ahead",
        "seconds_left": of all stages, from what they took before, or None,
        "error", "memory", "history": one dict a step, "orders": {method: latent error} of the orders that
        were measured, or {}}; stage is queued,
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
        "drawing": bool(job and job.drawing),
        "stage": stage,
        "step": step,
        "steps": opened.config.total_steps,
        "warm_steps": opened.config.warm_steps,
        "share": _share(opened, job),
        "ahead": server().worker.ahead(job) if job else 0,
        "seconds_left": _seconds_left(job) if job else None,
        "error": opened.error,
        "memory": opened.memory,
        "history": state.history if state else [],
        "orders": measured_orders(state) if state else {},
    }


def _share(run: Run, job: Job | None) -> float | None:
    """Of a method that ranks in one step, how much is done: denoiser calls of those that it takes."""
    method = METHODS.get(run.config.method or "")
    if method is None or not method.wide or (job and not job.active):
        return None
    calls = job.run.calls if job else Progress(run.folder / PROGRESS).calls
    expected = method.expected_calls(run.config.inference_steps or 50, run.config.warm_steps)
    return min(1.0, calls / expected) if job or calls else None


def _seconds_left(job: Job) -> float | None:
    """Until the run is finished: learning, and what repairing needs after it."""
    now, pace = time.monotonic(), job.seconds_left
    share = _share(job.run, job)
    if job.stage == "learning" and pace is None and share and 0.05 < share < 1:
        pace = (now - job.since) * (1 - share) / share
    step = sum(job.seconds) / len(job.seconds) if job.seconds else None
    recorded = server().timings.last(job.run.model, "record")
    after = None if recorded is None else recorded * job.run.compensation.trajectories
    if after is None and step is not None:
        after = CALIBRATION_STEPS * step
    if job.stage == "calibrating" and after is not None:
        left = after - (now - job.since)
        return left if left > 0 else None  # it takes longer than it took before
    return pace + (after or 0.0) if job.stage == "learning" and pace is not None else None


def _stage(run: Run, step: int) -> str:
    """The stage of a run that no job of this process is about: by what is on disk."""
    if step >= run.config.total_steps:
        unasked = run.imported or run.error or run.stop_requested  # the first image will take longer
        return "finished" if unasked or server().devices.calibrated(run) else "calibrating"
    if run.busy:
        return "learning"
    if run.error:
        return "failed"
    return "stopped" if run.stop_requested else "interrupted"


def disk_bytes(run: str) -> int:
    """Size of a run's files. Not in `status`, which is asked again and again."""
    return folder_bytes(server().store.open(run).folder)


def fail(run: str, message: str) -> dict:
    """Keep with a run why it could not go on; it can be resumed. Returns its status."""
    server().store.open(run).record(message)
    return status(run)


def changeable(run: str) -> Run:
    """The run of that id. Raises RunError if it is an example, which is everybody's."""
    if run in EXAMPLES:
        raise RunError(
            "This is the example that comes with ecodiff. Prune a model to have a run of your own."
        )
    return server().store.open(run)


def example(model: str) -> dict:
    """The finished run that ships with an embedded model.

    Returns:
        {"run": its id, "title", "pictures": as `pictures` returns them}, or {} where none ships
    """
    run = example_of(model)
    if run is None:
        return {}
    return {"run": run, "title": catalog.find(model).title, "pictures": load(EXAMPLES[run])}


def examples() -> list[dict]:
    """{"run": id, "name"} of every example. None is copied to the runs before somebody opens it."""
    return [{"run": run, "name": Run.open(folder).name} for run, folder in EXAMPLES.items()]


def stop(run: str) -> dict:
    """Ask a run to stop. It does so within one time step and can be resumed."""
    server().worker.stop(changeable(run))
    return status(run)


def resume(run: str, token: str = "") -> dict:
    """Go on with a run that was stopped, failed or interrupted.

    Args:
        token: as `start` takes it.
    """
    opened = changeable(run)
    if machine.zerogpu():
        opened.permit()
        opened.forget_error()
    elif not opened.finished:
        server().worker.submit(opened, token)
    return status(run)


def delete(run: str) -> dict:
    """Delete a run and all its files. Raises RunError while something works on it.

    Returns:
        {"deleted": its id}
    """
    opened, job = changeable(run), server().worker.job(run)
    if opened.busy or (job and job.active):
        raise RunError("The run is being worked on. Stop it first, then delete it.")
    server().store.delete(opened)
    return {"deleted": run}


def rename(run: str, name: str) -> dict:
    """Give a run a name of up to 60 characters."""
    opened = changeable(run)
    opened.name = " ".join(str(name).split())[:60]
    opened.save()
    return status(run)
