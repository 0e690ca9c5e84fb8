"""The worker: a thread for each device that learns one run after another, whoever watches."""

import itertools
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

from ..checkpoints.sign_in import signed_in
from ..errors import EcodiffError, OutOfMemoryError, RunError, memory_advice
from ..learning.state import LearnState
from ..pruning.slicing import variant
from ..runs.folder import Run
from ..runs.loop import Stopped, learn_run
from ..runs.pictures import SIZES, Painter
from .devices import Device, Devices

MAX_WAITING = 16
MAX_KEPT = 64  # jobs that are done

ADVICE = (
    "Nothing is lost. Try again when nothing else is learned or drawn here, or take a smaller model or image."
)

ACTIVE = ("queued", "loading", "learning", "calibrating")


@dataclass
class Job:
    """A run that was handed to the worker in this process."""

    run: Run
    stage: str = "queued"  # queued, loading, learning, calibrating, finished, stopped, failed
    seconds: deque = field(default_factory=lambda: deque(maxlen=8))  # of the last steps
    state: LearnState | None = None
    since: float = 0.0  # when its stage began, time.monotonic()
    token: str = field(default="", repr=False)  # of the Hub, to fetch the model with
    drawing: bool = False  # it is finished, and its pictures are drawn

    @property
    def active(self) -> bool:
        return self.stage in ACTIVE

    @property
    def seconds_left(self) -> float | None:
        """Measured time of the last steps times the steps that are left; None before the first."""
        if not self.seconds or self.state is None:
            return None
        left = self.run.config.total_steps - self.state.step
        return left * sum(self.seconds) / len(self.seconds)


class Worker:
    """Runs in the order in which they were handed in, in daemon threads."""

    def __init__(self, devices: Devices):
        self.devices = devices
        self._jobs: dict[str, Job] = {}
        self._waiting: deque[Job] = deque()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._more = threading.Condition(self._lock)

    def submit(self, run: Run, token: str = "") -> Job:
        """Queue a run (or do nothing if it is queued or running).

        Args:
            token: of the Hub, to fetch its model with; "": this machine's own.

        Raises:
            RunError: too many runs are waiting.
        """
        with self._lock:
            job = self._jobs.get(run.id)
            if job is not None and job.active:
                return job
            if len(self._waiting) >= MAX_WAITING:
                raise RunError(f"{MAX_WAITING} runs are waiting already. Try again later.")
            run.permit()
            self._jobs.pop(run.id, None)  # so that the order is that of the queue
            job = self._jobs[run.id] = Job(run, state=run.state(), token=token)
            self._waiting.append(job)
            self._more.notify()
            self._forget()
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._work, args=[device], daemon=True, name="ecodiff-worker")
                    for device in self.devices.learning
                ]
                for thread in self._threads:
                    thread.start()
            return job

    def job(self, run_id: str) -> Job | None:
        """The job of a run, if this process has or had one."""
        return self._jobs.get(run_id)

    def ahead(self, job: Job) -> int:
        """How many runs come before a queued one."""
        if job.stage != "queued":
            return 0
        before = itertools.takewhile(lambda other: other is not job, list(self._jobs.values()))
        return sum(other.active for other in before)

    def stop(self, run: Run) -> None:
        """Ask a run to stop: at once if it waits, within one time step if it learns."""
        run.request_stop()
        with self._lock:
            job = self._jobs.get(run.id)
            if job is not None and job.stage == "queued":
                job.stage = "stopped"
                self._waiting.remove(job)

    def _forget(self) -> None:
        """Keep the last jobs only: of older ones the disk knows all there is to know."""
        done = [run for run, job in self._jobs.items() if not job.active]
        for run in done[: max(0, len(done) - MAX_KEPT)]:
            del self._jobs[run]

    def _work(self, device: Device) -> None:
        while True:
            with self._more:
                while not self._waiting:
                    self._more.wait()
                job = self._waiting.popleft()
                job.stage = "loading"
            try:
                with memory_advice(ADVICE), signed_in(job.token):
                    self._learn(job, device)
            except EcodiffError as error:
                job.run.record(str(error))
                job.stage = "failed"
            except Exception:  # the thread must outlive a bug; the run keeps its last saved state
                traceback.print_exc()
                if job.stage != "finished":  # what comes after it only saves time
                    job.run.record("ecodiff failed unexpectedly; the server's log says where. Resume?")
                    job.stage = "failed"
            finally:
                job.token = ""

    def _learn(self, job: Job, device: Device) -> None:
        pipe = device.dense(job.run.model)
        job.stage, job.since = "learning", time.monotonic()

        def raise_if_stopped(step: int) -> None:
            if job.run.stop_requested:
                raise Stopped

        painter, learned = Painter(job.run, pipe, device.lock, raise_if_stopped), 0.0
        if job.run.config.method and job.state is None:  # one long step: nothing else is to be seen in it
            with suppress(EcodiffError, Stopped), memory_advice(ADVICE):
                painter.begin()
        for state, seconds in learn_run(job.run, pipe, device.lock):
            job.state = state
            job.seconds.append(seconds)
            learned += seconds
            if painter.due(learned, seconds) and (job.run.folder / "scores.safetensors").exists():
                with suppress(EcodiffError, Stopped), memory_advice(ADVICE):  # a picture is worth no run
                    plan = job.run.plan(job.run.config.ratio)
                    painter.paint(variant(pipe, plan), plan, job.run.config.ratio, repaired=False)
        finished = job.run.finished
        if finished:
            job.stage, job.since = "calibrating", time.monotonic()
            with suppress(OutOfMemoryError), memory_advice(ADVICE):  # whoever draws will be told
                device.calibration(job.run)
                spent = time.monotonic() - job.since
                device.timings.note(job.run.model, record=spent / job.run.compensation.trajectories)
        job.drawing = finished
        job.stage = "finished" if finished else "stopped"
        if finished:
            try:
                with suppress(EcodiffError, Stopped), memory_advice(ADVICE):
                    self._prepare(job.run, device, painter, learned)
            finally:
                job.drawing = False

    def _prepare(self, run: Run, device: Device, painter: Painter, learned: float) -> None:
        """What the first images would wait for, and the run's pictures; nobody waits for it yet."""

        def paint(ratio: float) -> None:
            plan = run.plan(ratio)
            small = device.pruned(run, plan, keep=False)
            painter.paint(small, plan, ratio, repaired=True)

        paint(run.config.ratio)
        if device is self.devices.drawing:
            with device.lock:
                device.calibration(run).prepare()
        begun = time.monotonic()
        for ratio in SIZES:
            if self._waiting or time.monotonic() - begun > learned:  # never longer than learning took
                return
            if abs(ratio - run.config.ratio) > 1e-6:
                paint(ratio)
