"""Tasks: what needs the device. On ZeroGPU they run in a worker; elsewhere in this process.

A task is a frozen dataclass of plain data: `run` does it where the GPU is, `seconds` says how long it may
take there. A ZeroGPU worker is a forked process that is used again while it is warm: it gets a task, gives
back plain data, and what it loaded stays with it. Elsewhere `spaces.GPU` does nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import spaces
from diffusers import DiffusionPipeline

from .. import machine
from ..checkpoints import loading
from ..checkpoints.card import model_card
from ..checkpoints.formats import find_format
from ..checkpoints.sign_in import signed_in
from ..checkpoints.unused import lean
from ..errors import EcodiffError, OutOfMemoryError, RunError, memory_advice
from ..learning import calibration
from ..metrics.cost import speedup
from ..metrics.fidelity import Sample, generate
from ..pipelines import call_options, denoiser_name, prompt_rows
from ..pruning.plan import PrunePlan
from ..runs.folder import Run
from ..runs.healing import heal_run, healed
from ..runs.loop import learn_run
from ..runs.pictures import COUNT, Painter
from .server import server
from .worker import ADVICE

UNRECORDED = (
    "The masks are learned. What compensation needs could not be kept (is the disk full?): images and "
    "downloads with it will take longer, or more than a call may take. Without it they do not."
)


@dataclass(frozen=True)
class Failure:
    """An error that a person should read. Raised in a worker, its text would be lost, and the worker."""

    message: str


class Task(Protocol):
    """What `work` runs: pickled on ZeroGPU, like its results."""

    def run(self) -> Iterator[Any]:
        """Do it, yielding results as they come."""
        ...

    def seconds(self, timings: machine.Timings) -> float:
        """GPU time that the call asks ZeroGPU for: from what the same took before."""
        ...


def _whole_call() -> float:
    return machine.CHUNK_SECONDS + machine.START_SECONDS


@dataclass(frozen=True)
class LearnRun:
    """Learn for one call, or record what compensation needs; yields {"step", "seconds"} after each part.

    The state is on disk.
    """

    folder: str
    token: str = field(default="", repr=False)  # of the Hub, to fetch the model with

    def run(self) -> Iterator[dict]:
        run, started, device = Run.open(Path(self.folder)), time.monotonic(), server().devices.drawing
        with signed_in(self.token):
            pipe = device.dense(run.model)
        left = machine.CHUNK_SECONDS - (time.monotonic() - started)
        if not run.finished:
            for state, seconds in learn_run(run, pipe, device.lock, budget=left):
                server().timings.note(run.model, step=seconds)
                yield {"step": state.step, "seconds": seconds}
        if run.finished:
            yield from self._record(run, pipe, started)

    def _record(self, run: Run, pipe: DiffusionPipeline, started: float) -> Iterator[dict]:
        config, prompts, slowest = run.compensation, run.learned_on, 0.0
        folder = server().devices.recordings(run)
        batches = calibration.missing(config, folder)
        while batches:  # each call adds one at least, or says why not: else the page would call for ever
            begun, before = time.monotonic(), len(batches)
            list(calibration.record(pipe, prompts, config, folder, batches=batches[:1]))
            batches = calibration.missing(config, folder)
            if len(batches) >= before:
                run.record(UNRECORDED)
                raise RunError(UNRECORDED)
            slowest = max(slowest, time.monotonic() - begun)
            yield {"step": run.config.total_steps, "seconds": 0.0}
            if run.stop_requested or time.monotonic() - started + 1.5 * slowest > machine.CHUNK_SECONDS:
                return

    def seconds(self, timings: machine.Timings) -> float:
        run = Run.open(Path(self.folder))
        state = run.state()
        left = run.config.total_steps - (state.step if state else 0)
        if not left:  # recording comes next, as long as it may
            return _whole_call()
        return min(_whole_call(), timings.seconds(run.model, "load", *["step"] * left))


@dataclass(frozen=True)
class DrawImages:
    """For each (prompt, seed), a dense and the pruned images from the same noise, timed after a warm-up.

    Yields image after image, so that whoever does not wait for the next one ends it. On ZeroGPU it ends
    early, after the last image of a prompt, when the call's time is up.
    """

    folder: str  # of the run
    plans: list[PrunePlan]
    asked: list[tuple[str, int]]
    options: dict = field(default_factory=dict)
    compensate: bool = True
    timed: bool = False  # measure how much faster the last one is than the dense one

    def run(self) -> Iterator[Sample]:
        begun, device = time.monotonic(), server().devices.drawing
        pipes: list[DiffusionPipeline] = []
        for index, (prompt, seed) in enumerate(self.asked):
            if index and machine.zerogpu() and time.monotonic() - begun > machine.CHUNK_SECONDS:
                return
            started = time.monotonic()
            for place in range(1 + len(self.plans)):
                with device.lock:  # others draw and learn between images
                    pipes = pipes or self._pipes(prompt, seed)
                    sample = generate(pipes[place], prompt, seed, **self.options)
                    if self.timed and place == len(self.plans):
                        sample = replace(sample, speedup=self._speedup(pipes))
                if place == len(self.plans):
                    server().timings.note(self._model, draw=(time.monotonic() - started) / len(pipes))
                yield sample

    def _speedup(self, pipes: list[DiffusionPipeline]) -> tuple[float, float, float] | None:
        """How much faster the last one's call is: measured once, weights and prompts make no difference."""
        known = server().devices.drawing.speedups
        key = self.plans[-1].digest, repr(self.options | {"steps": None})
        if known.get(key) is None:
            call = prompt_rows([self.asked[0][0]], [0], 0, call_options(pipes[0], **self.options))
            known[key] = speedup(pipes[0], pipes[-1], call)
        return known[key]

    def _pipes(self, prompt: str, seed: int) -> list[DiffusionPipeline]:
        """The dense one and a variant a plan, warm."""
        run, device = Run.open(Path(self.folder)), server().devices.drawing
        variants = [device.pruned(run, plan, self.compensate) for plan in self.plans]
        pipes = [device.dense(run.model), *variants]
        for pipe in pipes:
            generate(pipe, prompt, seed, **self.options | {"steps": 2})
        return pipes

    @property
    def _model(self) -> str:
        return Run.open(Path(self.folder)).model

    def seconds(self, timings: machine.Timings) -> float:
        images = (1 + len(self.plans)) * len(self.asked)
        return min(2 * machine.CHUNK_SECONDS, timings.seconds(self._model, "load", *["draw"] * images))


@dataclass(frozen=True)
class DrawPictures:
    """Draw a run's pictures at one size, repaired; yields them as `runs.pictures.load` does."""

    folder: str
    ratio: float

    def run(self) -> Iterator[dict]:
        run, device = Run.open(Path(self.folder)), server().devices.drawing
        plan = run.plan(self.ratio)
        with device.lock:
            dense = device.dense(run.model)
            small = device.pruned(run, plan)
        yield Painter(run, dense, device.lock).paint(small, plan, self.ratio, repaired=True)

    def seconds(self, timings: machine.Timings) -> float:
        model = Run.open(Path(self.folder)).model
        return min(2 * machine.CHUNK_SECONDS, timings.seconds(model, "load", *["draw"] * 2 * COUNT))


@dataclass(frozen=True)
class DrawLoras:
    """One prompt with the dense model and a LoRA, then with the pruned one and the LoRA cut to fit."""

    folder: str  # of the run
    plan: PrunePlan
    files: tuple[str, str]
    prompt: str
    seed: int
    options: dict

    def run(self) -> Iterator[Sample]:
        run, device = Run.open(Path(self.folder)), server().devices.drawing
        with device.lock:
            small = device.pruned(run, self.plan)
            pipes = device.dense(run.model), small
            for pipe, file in zip(pipes, self.files, strict=True):
                second = {"load_into_transformer_2": True} if denoiser_name(pipe) == "transformer_2" else {}
                try:
                    pipe.load_lora_weights(file, **second)
                    yield generate(pipe, self.prompt, self.seed, **self.options)
                except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
                    words = str(error).splitlines() or [type(error).__name__]
                    raise RunError(f"diffusers could not load this LoRA: {words[0][:200]}") from None
                finally:
                    pipe.unload_lora_weights()

    def seconds(self, timings: machine.Timings) -> float:
        model = Run.open(Path(self.folder)).model
        return min(2 * machine.CHUNK_SECONDS, timings.seconds(model, "load", "draw", "draw"))


@dataclass(frozen=True)
class HealRun:
    """Heal a run's variant, on ZeroGPU for one call; yields what `heal_run` does."""

    folder: str
    plan: PrunePlan
    steps: int
    repair: int

    def run(self) -> Iterator[dict]:
        run, begun, device = Run.open(Path(self.folder)), time.monotonic(), server().devices.learning[-1]
        with device.lock:
            dense = device.dense(run.model)
            before = device.pruned(run, self.plan, healed=False)
        left = machine.CHUNK_SECONDS - (time.monotonic() - begun) if machine.zerogpu() else None
        yield from heal_run(run, self.plan, self.steps, self.repair, dense, before, device.lock, left)

    def seconds(self, timings: machine.Timings) -> float:
        return _whole_call()


@dataclass(frozen=True)
class SavePruned:
    """Write the pruned pipeline to `out`; yields where it lies, and what was left out of it."""

    folder: str  # of the run
    plan: PrunePlan
    compensate: bool
    out: str
    format: str = "diffusers"
    lean: bool = False  # without what is never read of text encoders

    def run(self) -> Iterator:
        run, device = Run.open(Path(self.folder)), server().devices.drawing
        left_out: dict[str, int] = {}
        with device.lock:
            small = device.pruned(run, self.plan, self.compensate)
            started = time.monotonic()
            if self.lean:
                small, left_out = lean(small, run.known)
            about = healed(run.folder, self.plan) if self.compensate else None
            card = model_card(small, about["facts"]) if about else ""
            dtype = loading.disk_dtype(run.model)
            written = find_format(self.format).write(small, Path(self.out), dtype, card)
        server().timings.note(run.model, pack=time.monotonic() - started)
        yield str(written)
        yield left_out

    def seconds(self, timings: machine.Timings) -> float:
        model = Run.open(Path(self.folder)).model
        return min(2 * machine.CHUNK_SECONDS, timings.seconds(model, "load", "pack"))


def seconds_wanted(task: Task, *args, **kwargs) -> float:
    """GPU time that `work` asks ZeroGPU for."""
    return task.seconds(server().timings)


# One function for all tasks: ZeroGPU keeps a worker a function, and this one's pipelines serve them all.
@spaces.GPU(duration=seconds_wanted)
def work(task: Task) -> Iterator:
    """Run a task where the GPU is; a failure that a person should read is its last result."""
    try:
        with memory_advice(ADVICE):
            yield from task.run()
        return
    except EcodiffError as error:
        failure, exhausted = Failure(str(error)), isinstance(error, OutOfMemoryError)
    if exhausted:  # only now: the error held what was being computed
        server().devices.forget()
    yield failure


def results(task: Task) -> Iterator:
    """What a task yields, as it does. Raises RunError with what went wrong in it."""
    for result in work(task):
        if isinstance(result, Failure):
            raise RunError(result.message)
        yield result
