"""What needs the device: learning, drawing, healing, packing. All that ZeroGPU runs in a worker.

On ZeroGPU `work` runs in a forked process that is used again while it is warm: it is told ids, paths and
plans and gives back plain data; what it loaded stays with it. Elsewhere `spaces.GPU` does nothing and
everything happens in this process.
"""

import copy
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import spaces
from filelock import FileLock, Timeout

from . import backends, catalog, checkpoint, recording
from .errors import EcodiffError, OutOfMemoryError, RunError, memory_advice
from .fidelity import Sample, compare, generate
from .groups import denoiser_of
from .heal import facts, heal
from .places import DRAWING, LEARNING, PACE, PLACES, recordings
from .plan import PrunePlan, write_small
from .runs import Run
from .slicing import plan_of, variant

HEALED_PROMPTS = 8  # held out, to judge healing by
ADVICE = (
    "Nothing is lost. Try again when nothing else is learned or drawn here, or take a smaller model or image."
)
UNRECORDED = (
    "The masks are learned. What compensation needs could not be kept (is the disk full?): images and "
    "downloads with it will take longer, or more than a call may take. Without it they do not."
)


@dataclass(frozen=True)
class Failure:
    """An error that a person should read. Raised in a worker, its text would be lost, and the worker."""

    message: str


def _learn(folder: str) -> Iterator[dict]:
    """Learn for one call, or record what compensation needs; yields {"step", "seconds"} after each part.

    The state is on disk.
    """
    run, started = Run.open(Path(folder)), time.monotonic()
    pipe = DRAWING.dense(run.model)
    left = backends.CHUNK_SECONDS - (time.monotonic() - started)
    if not run.finished:
        for state, seconds in run.learn(pipe, DRAWING.turn, budget=left):
            PACE.note(run.model, step=seconds)
            yield {"step": state.step, "seconds": seconds}
    if not run.finished:
        return
    known, folder, slowest = catalog.find(run.model), recordings(run.model), 0.0
    config, prompts = known.compensation(), known.prompts("calibration")
    batches = recording.missing(config, folder)
    while batches:  # each call adds one at least, or says why not: else the page would call for ever
        begun, before = time.monotonic(), len(batches)
        list(recording.record(pipe, prompts, config, folder, batches=batches[:1]))
        batches = recording.missing(config, folder)
        if len(batches) >= before:
            run.record(UNRECORDED)
            raise RunError(UNRECORDED)
        slowest = max(slowest, time.monotonic() - begun)
        yield {"step": run.config.total_steps, "seconds": 0.0}
        if run.stop_requested or time.monotonic() - started + 1.5 * slowest > backends.CHUNK_SECONDS:
            return


def _draw(
    model: str,
    plans: list[PrunePlan],
    asked: list[tuple[str, int]],
    options: dict,
    compensate: bool,
    kept: str,
) -> Iterator[tuple[Sample, ...]]:
    """For each (prompt, seed), a dense and the pruned images from the same noise, timed after a warm-up.

    On ZeroGPU it ends early when the call's time is up.
    """
    begun, pipes = time.monotonic(), []
    for index, (prompt, seed) in enumerate(asked):
        started = time.monotonic()
        if index and backends.zerogpu() and started - begun > backends.CHUNK_SECONDS:
            return
        with DRAWING.turn:  # others draw and learn between prompts
            if not pipes:
                variants = [DRAWING.pruned(model, plan, compensate, Path(kept)) for plan in plans]
                pipes = [DRAWING.dense(model), *variants]
                for pipe in pipes:
                    generate(pipe, prompt, seed, **options | {"steps": 2})
            samples = tuple(generate(pipe, prompt, seed, **options) for pipe in pipes)
        PACE.note(model, draw=(time.monotonic() - started) / len(pipes))
        yield samples


def _draw_loras(
    model: str, plan: PrunePlan, kept: str, files: tuple[str, str], prompt: str, seed: int, options: dict
) -> Iterator[Sample]:
    """One prompt with the dense model and a LoRA, then with the pruned one and the LoRA cut to fit."""
    with DRAWING.turn:
        for pipe, file in zip(
            (DRAWING.dense(model), DRAWING.pruned(model, plan, True, Path(kept))), files, strict=True
        ):
            try:
                pipe.load_lora_weights(file)
                yield generate(pipe, prompt, seed, **options)
            except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
                words = str(error).splitlines() or [type(error).__name__]
                raise RunError(f"diffusers could not load this LoRA: {words[0][:200]}") from None
            finally:
                pipe.unload_lora_weights()


def _heal(folder: str, plan: PrunePlan, steps: int) -> Iterator[dict]:
    """Heal a run's variant, on ZeroGPU for one call; if it got closer, it takes the compensated one's place.

    Yields {"step", "loss", "seconds"} after every step, and last what `healed` reads. The state is on disk.
    """
    run, begun, slowest, place = Run.open(Path(folder)), time.monotonic(), 0.0, LEARNING[-1]
    known, kept = catalog.find(run.model), run.folder / "variants"
    config, state = known.heal_config(steps=steps), run.folder / "healing" / plan.digest
    try:
        with FileLock(run.folder / ".lock", timeout=0):
            with place.turn:
                dense = place.dense(run.model)
                before = place.pruned(run.model, plan, True, kept)
                small = copy.copy(before)  # it gets a denoiser of its own
            healing = heal(small, dense, known.prompts("calibration"), config, state)
            while True:
                started = time.monotonic()
                with place.turn:  # others draw between steps
                    done = next(healing, None)
                if done is None:
                    break
                slowest = max(slowest, time.monotonic() - started)
                yield {"step": done[0], "loss": done[1], "seconds": time.monotonic() - started}
                over = time.monotonic() - begun + 1.5 * slowest > backends.CHUNK_SECONDS
                if run.stop_requested or (backends.zerogpu() and over and done[0] < steps):
                    healing.close()
                    return
            prompts = known.prompts("heldout")[:HEALED_PROMPTS]
            with place.turn:
                was = compare(dense, before, prompts, **known.drawing())["mean"]
                now = compare(dense, small, prompts, **known.drawing())["mean"]
            result = {"before": was["latent_error"], "after": now["latent_error"], "steps": steps}
            if result["after"] < result["before"]:
                plain = denoiser_of(variant(dense, plan)).state_dict()
                weights = {n: w for n, w in denoiser_of(small).state_dict().items() if not w.equal(plain[n])}
                write_small(
                    kept / f"{plan.digest}.safetensors",
                    {name: weight.contiguous().cpu() for name, weight in weights.items()},
                    {},
                )
                about = result | {"facts": facts(config, was, now, len(prompts))}
                (kept / f"{plan.digest}.json").write_text(json.dumps(about), encoding="utf-8")
            yield result
    except Timeout:
        raise RunError("The run is being worked on already.") from None


def healed(folder: Path, plan: PrunePlan) -> dict | None:
    """{"before", "after": latent error, "steps", "facts"} of a run's variant that was healed; else None."""
    with suppress(OSError, ValueError):
        return json.loads((folder / "variants" / f"{plan.digest}.json").read_text(encoding="utf-8"))
    return None


def _pack(model: str, plan: PrunePlan, compensate: bool, kept: str, folder: str) -> Iterator[str]:
    """Write the pruned pipeline to `folder`."""
    with DRAWING.turn:
        small, started = DRAWING.pruned(model, plan, compensate, Path(kept)), time.monotonic()
        assert plan_of(denoiser_of(small)).digest == plan.digest
        about = healed(Path(kept).parent, plan) if compensate else None
        card = checkpoint.model_card(small, about["facts"]) if about else ""
        written = checkpoint.save(small, Path(folder), checkpoint.disk_dtype(model), card)
    PACE.note(model, pack=time.monotonic() - started)
    yield str(written)


TASKS = {"learn": _learn, "draw": _draw, "draw_loras": _draw_loras, "heal": _heal, "pack": _pack}


def seconds_wanted(task: str, *args, **kwargs) -> float:
    """GPU time that a call asks ZeroGPU for: from what the same took before."""
    if task == "learn":
        run = Run.open(Path(args[0]))
        state = run.state()
        left = run.config.total_steps - (state.step if state else 0)
        if not left:  # recording comes next, as long as it may
            return backends.CHUNK_SECONDS + backends.START_SECONDS
        rest = PACE.seconds(run.model, "load", *["step"] * left)
        return min(backends.CHUNK_SECONDS + backends.START_SECONDS, rest)
    if task == "heal":
        return backends.CHUNK_SECONDS + backends.START_SECONDS
    images = (1 + len(args[1])) * len(args[2]) if task == "draw" else 2 if task == "draw_loras" else 1
    pace = "draw" if task == "draw_loras" else task
    return min(2 * backends.CHUNK_SECONDS, PACE.seconds(args[0], "load", *[pace] * images))


# One function for all tasks: ZeroGPU keeps a worker a function, and this one's pipelines serve them all.
@spaces.GPU(duration=seconds_wanted)
def work(task: str, *args) -> Iterator:
    """Run one of TASKS where the GPU is. Arguments and results are pickled on ZeroGPU."""
    try:
        with memory_advice(ADVICE):
            yield from TASKS[task](*args)
        return
    except EcodiffError as error:
        failure, exhausted = Failure(str(error)), isinstance(error, OutOfMemoryError)
    if exhausted:  # only now: the error held what was being computed
        for place in PLACES:
            place.forget()
    yield failure


def results(task: str, *args) -> Iterator:
    """What a task yields, as it does. Raises RunError with what went wrong in it."""
    for result in work(task, *args):
        if isinstance(result, Failure):
            raise RunError(result.message)
        yield result
