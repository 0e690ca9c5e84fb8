"""Learning a run: from where it is on disk, saving as it goes, to the end or until somebody stops it."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

from diffusers import DiffusionPipeline
from filelock import FileLock, Timeout

from ..errors import EcodiffError, RunError, memory_advice
from ..learning import distributed
from ..learning.learn import learn
from ..learning.progress import Paused, Progress
from ..learning.state import LearnState
from ..learning.text_encoders import rank_text_encoders
from ..pruning.scores import Scores
from .folder import TEXT_ENCODERS, Run, cut_text_encoders

PROGRESS = "progress"  # folder of a ranking in one step that is not finished
SAVE_SECONDS = 2.0  # a state is saved after the first step that ends this long after the last save
LOCK_SECONDS = 5.0  # a call that follows another one may come before that one has saved its state

ADVICE = "The run is kept: free memory, or start a new one with a smaller batch or image size, and resume."


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside a step when a stop was requested."""


def advance(
    run: Run,
    pipe: DiffusionPipeline,
    on_progress: Callable[[LearnState, float], None] | None = None,
    device_lock: AbstractContextManager | None = None,
) -> bool:
    """Learn to the end, also if it was stopped before. True unless it is stopped again.

    Args:
        on_progress: called with what `learn_run` yields.
    """
    run.permit()
    for state, seconds in learn_run(run, pipe, device_lock):
        if on_progress is not None:
            on_progress(state, seconds)
    return run.finished


def learn_run(
    run: Run,
    pipe: DiffusionPipeline,
    device_lock: AbstractContextManager | None = None,
    budget: float | None = None,
) -> Iterator[tuple[LearnState, float]]:
    """Learn from where the run is, saving as it goes; yields states and seconds that each took.

    Ends when all steps are done, when a stop was requested, or when another step would not fit in the
    budget. However it ends, it goes on from there.

    Args:
        device_lock: held during each step.
        budget: seconds; at least one step is made, or one part of a ranking in one step.

    Raises:
        RunError: another process is working on it.
        LearningError, OutOfMemoryError, CheckpointError: it failed; the last saved state is kept.
    """
    if distributed.rank():  # the first process keeps the files
        yield from _steps(run, pipe, device_lock, budget)
        return
    run.forget_error()
    try:
        with FileLock(run.folder / ".lock", timeout=LOCK_SECONDS), memory_advice(ADVICE):
            yield from _steps(run, pipe, device_lock, budget)
    except Timeout:
        raise RunError(f"Another process is working on the run in {run.folder}.") from None
    except EcodiffError as error:
        run.record(str(error))
        raise


def _steps(run: Run, pipe: DiffusionPipeline, device_lock, budget) -> Iterator[tuple[LearnState, float]]:
    begun = saved = started = time.monotonic()
    state, scores, slowest = None, None, 0.0
    alone, first = distributed.count() == 1, distributed.rank() == 0
    progress = Progress(run.folder / PROGRESS if first else None, budget)
    run.calls = progress.calls

    def count() -> None:
        run.calls += 1
        raise_if_stopped()

    def raise_if_stopped() -> None:
        if distributed.agreed(run.stop_requested):
            raise Stopped

    try:
        raise_if_stopped()  # while it was loaded, or its first pictures were drawn
        if first:
            with device_lock or nullcontext():
                _rank_text_encoders(run, pipe, raise_if_stopped if alone else None)
        steps = learn(
            pipe,
            run.prompts,
            run.config,
            run.state(),
            on_step=count if alone else None,
            on_plan=run.note_memory if first else None,
            device_lock=device_lock,
            kept=progress,
        )
        for state, scores in steps:
            now = time.monotonic()
            if first and now - saved >= SAVE_SECONDS:
                _save(run, state, scores)
                saved = now
            slowest = max(slowest, now - started)
            yield state, now - started
            raise_if_stopped()
            started = time.monotonic()
            if budget is not None and started - begun + 1.5 * slowest > budget:
                return
    except Paused:
        progress.paused(run.calls)
    except Stopped:
        return
    finally:
        if scores is not None and state is not None and first:
            _save(run, state, scores)


def _rank_text_encoders(run: Run, pipe: DiffusionPipeline, on_prompt: Callable[[], None] | None) -> None:
    """Rank what of the text encoders is to go too, unless that is done or nothing is to."""
    file, ratio = run.folder / TEXT_ENCODERS, run.config.text_encoders
    if not ratio or file.exists():
        return
    scores = rank_text_encoders(pipe, run.learned_on, run.config, on_prompt)
    cut_text_encoders(scores, ratio)  # an impossible size is told now, and not after learning
    scores.save(file)


def _save(run: Run, state: LearnState, scores: Scores) -> None:
    scores.save(run.folder / "scores.safetensors")
    state.save(run.folder / "state.safetensors")
    Progress(run.folder / PROGRESS).forget()
