"""A run is a folder: what was asked, the state of learning, the scores. It survives a kill.

run.json              model, configuration, prompts; written once
state.safetensors     where learning is, replaced atomically
scores.safetensors    the ranking so far; final once all steps are done
plan.safetensors      a plan that was brought, instead of a ranking
plans/, models/       what was cut from it
variants/             weights that compensation gave, by plan
STOP, ERROR, MEMORY   a request to stop; why it last failed; what is kept in memory
"""

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from . import processes
from .checkpoint import empty_denoiser
from .errors import CheckpointError, EcodiffError, RunError, memory_advice
from .imports import bring
from .learn import learn
from .plan import PrunePlan
from .scores import Scores
from .state import LearnConfig, LearnState

RUN_FORMAT = "ecodiff.run.1"
MIN_FREE_BYTES = 256 << 20
SAVE_SECONDS = 2.0  # a state is saved after the first step that ends this long after the last save


def store_root() -> Path:
    """Where runs live: $ECODIFF_HOME/runs, /data/ecodiff/runs on a Space with storage, or ~."""
    home = os.environ.get("ECODIFF_HOME")
    if home:
        return Path(home).expanduser() / "runs"
    if os.environ.get("SPACE_ID") and os.access("/data", os.W_OK):
        return Path("/data/ecodiff/runs")
    return Path.home() / ".cache" / "ecodiff" / "runs"


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside a step when a stop was requested."""


@dataclass
class Run:
    """One mask learning job on disk."""

    folder: Path
    model: str
    config: LearnConfig
    prompts: list[str]
    preset: str = ""
    created: float = 0.0
    name: str = ""
    imported: bool = False  # nothing is learned: what others learned was brought
    visitor: str = ""  # who started it, on a server that is shared: a hash

    @property
    def id(self) -> str:
        return self.folder.name

    @classmethod
    def create(cls, folder: Path, model: str, config: LearnConfig, prompts, preset="") -> "Run":
        """Start a new run in `folder`.

        Raises:
            RunError: there is a run already, or the folder holds something else.
            CheckpointError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} exists and is not empty. Name a new folder for the run.")
        run = cls(folder, model, config, list(prompts), preset, time.time())
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.save()
        except OSError as error:
            raise CheckpointError(f"Could not create the run in {folder}: {error}.") from None
        return run

    @classmethod
    def bring(cls, folder: Path, model: str, config: LearnConfig, files: Sequence[str | Path]) -> "Run":
        """A run that needs no learning: a plan, a pruned folder's zip, or EcoDiff's masks (see `imports`).

        Raises:
            CheckpointError, PlanError: the files hold nothing that fits the model.
        """
        denoiser = empty_denoiser(model)
        brought = bring(files, denoiser)
        facts = brought.metadata | {"model": model}
        run = cls.create(folder, model, config, [], "imported")
        run.imported = True
        if isinstance(brought, PrunePlan):
            PrunePlan(brought, facts).save(run.folder / "plan.safetensors")
        else:
            replace(brought, metadata=facts).save(run.folder / "scores.safetensors")
        run.save()
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open what `create` made. Raises RunError if it is not a run."""
        folder = Path(folder)
        try:
            about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            if about.pop("format") != RUN_FORMAT:
                raise ValueError("another format")
            config = LearnConfig(**about.pop("config"))
            run = cls(folder=folder, config=config, **about)
            _check(run)
            return run
        except FileNotFoundError:
            raise RunError(f"{folder} is not a run: it has no run.json.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"The run in {folder} cannot be read: {error}.") from None

    @property
    def touched(self) -> float:
        """When something was last written to it, in seconds since 1970."""
        return max(file.stat().st_mtime for file in self.folder.glob("*"))

    def save(self) -> None:
        """Write run.json atomically."""
        about = asdict(self) | {"format": RUN_FORMAT}
        del about["folder"]
        partial = self.folder / "run.json.partial"
        partial.write_text(json.dumps(about, indent=1), encoding="utf-8")
        partial.replace(self.folder / "run.json")

    def state(self) -> LearnState | None:
        path = self.folder / "state.safetensors"
        return LearnState.load(path) if path.exists() else None

    def scores(self) -> Scores:
        """The ranking as far as it is learned. Raises CheckpointError if there is none yet."""
        return Scores.load(self.folder / "scores.safetensors")

    def plan(self, ratio: float) -> PrunePlan:
        """What stays at a size. Milliseconds: nothing is learned again. A plan that was brought has one size.

        Raises:
            RunError: nothing is learned yet.
            BudgetError: the ratio is out of range.
        """
        if (brought := self.folder / "plan.safetensors").exists():
            return PrunePlan.load(brought)
        if not (self.folder / "scores.safetensors").exists():
            raise RunError("This run has no scores yet. Let it learn for a few steps first.")
        plan = self.scores().plan(ratio=ratio)
        plan.metadata |= {"model": self.model}
        return plan

    @property
    def finished(self) -> bool:
        if self.imported:
            return True
        state = self.state()
        return state is not None and state.step >= self.config.total_steps

    def request_stop(self) -> None:
        (self.folder / "STOP").touch()

    def permit(self) -> None:
        """Take a request to stop back."""
        (self.folder / "STOP").unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """True while a process works on it."""
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    @property
    def stop_requested(self) -> bool:
        return (self.folder / "STOP").exists()

    @property
    def error(self) -> str:
        path = self.folder / "ERROR"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def advance(
        self,
        pipe,
        on_progress: Callable[[LearnState, float], None] | None = None,
        device_lock: AbstractContextManager | None = None,
    ) -> bool:
        """Learn to the end, also if it was stopped before. True unless it is stopped again.

        Args:
            on_progress: called with what `learn` yields.
        """
        self.permit()
        for state, seconds in self.learn(pipe, device_lock):
            if on_progress is not None:
                on_progress(state, seconds)
        return self.finished

    def learn(
        self, pipe, device_lock: AbstractContextManager | None = None, budget: float | None = None
    ) -> Iterator[tuple[LearnState, float]]:
        """Learn from where the run is, saving as it goes; yields states and seconds that each took.

        Ends when all steps are done, when a stop was requested, or when another step would not fit in
        the budget. However it ends, it goes on from there.

        Args:
            device_lock: held during each step.
            budget: seconds; at least one step is made.

        Raises:
            RunError: another process is working on it.
            LearningError, OutOfMemoryError, CheckpointError: it failed; the last saved state is kept.
        """
        if processes.rank():  # the first process keeps the files
            yield from self._learn(pipe, device_lock, budget)
            return
        self.forget_error()
        advice = (
            "The run is kept: free memory, or start a new one with a smaller batch or image size, and resume."
        )
        try:
            with FileLock(self.folder / ".lock", timeout=0), memory_advice(advice):
                yield from self._learn(pipe, device_lock, budget)
        except Timeout:
            raise RunError(f"Another process is working on the run in {self.folder}.") from None
        except EcodiffError as error:
            self.record(str(error))
            raise

    def _learn(self, pipe, device_lock, budget) -> Iterator[tuple[LearnState, float]]:
        begun = saved = started = time.monotonic()
        state, scores, slowest = None, None, 0.0
        alone, first = processes.count() == 1, processes.rank() == 0
        try:
            steps = learn(
                pipe,
                self.prompts,
                self.config,
                self.state(),
                on_step=self._raise_if_stopped if alone else None,
                on_plan=self._note_memory if first else None,
                device_lock=device_lock,
            )
            for state, scores in steps:
                now = time.monotonic()
                if first and now - saved >= SAVE_SECONDS:
                    self._save(state, scores)
                    saved = now
                slowest = max(slowest, now - started)
                yield state, now - started
                self._raise_if_stopped()
                started = time.monotonic()
                if budget is not None and started - begun + 1.5 * slowest > budget:
                    return
        except Stopped:
            return
        finally:
            if scores is not None and first:
                self._save(state, scores)

    def _save(self, state: LearnState, scores: Scores) -> None:
        scores.save(self.folder / "scores.safetensors")
        state.save(self.folder / "state.safetensors")

    def _raise_if_stopped(self) -> None:
        if processes.agreed(self.stop_requested):
            raise Stopped

    def forget_error(self) -> None:
        (self.folder / "ERROR").unlink(missing_ok=True)

    def _note_memory(self, words: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / "MEMORY").write_text(words, encoding="utf-8")

    @property
    def memory(self) -> str:
        """What learning keeps in memory, in words; "" before it started."""
        path = self.folder / "MEMORY"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def record(self, message: str) -> None:
        """Keep why the run failed, to be shown with it."""
        with contextlib.suppress(OSError):  # the disk may be what failed; the error is raised too
            (self.folder / "ERROR").write_text(message, encoding="utf-8")


def _check(run: Run) -> None:
    """Raise TypeError unless what a run.json said is of the right kinds."""
    words = (run.model, run.preset, run.name, run.visitor, *run.prompts)
    numbers = (run.created, run.config.total_steps)
    if not isinstance(run.prompts, list) or not all(isinstance(word, str) for word in words):
        raise TypeError("its words are no words")
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError("its numbers are no numbers")


class RunStore:
    """All runs under one folder. An id is a secret: who has it may use the run."""

    def __init__(self, root: Path | None = None):
        self.root = Path(root or store_root())

    def new_folder(self) -> Path:
        """A folder for a new run, named by 128 random bits. Raises RunError if the disk is nearly full."""
        self.require_space()
        return self.root / secrets.token_hex(16)

    def require_space(self) -> None:
        """Raise RunError unless some disk is left: a run that cannot save what it learned is lost time."""
        with contextlib.suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.root).free
            if free < MIN_FREE_BYTES:
                raise RunError(
                    f"The disk is nearly full ({free >> 20} MiB left in {self.root}). Delete runs that are "
                    "not needed, then try again."
                )

    def open(self, run_id: str) -> Run:
        """The run of that id. Raises RunError if there is none (or the id is not one)."""
        if not (len(run_id) == 32 and set(run_id) <= set("0123456789abcdef")):
            raise RunError("This is not the id of a run.")
        if not (self.root / run_id / "run.json").is_file():
            raise RunError("There is no such run any more. It may have expired.")
        return Run.open(self.root / run_id)

    def runs(self) -> Iterator[Run]:
        """All runs that can be read."""
        for file in self.root.glob("*/run.json"):
            with contextlib.suppress(RunError):
                yield Run.open(file.parent)

    def delete(self, run: Run) -> None:
        """Delete a run's folder. Raises CheckpointError if that fails."""
        try:
            shutil.rmtree(run.folder)
        except OSError as error:
            raise CheckpointError(f"Could not delete the run: {error}.") from None

    def sweep(self, max_age: float) -> int:
        """Delete runs, and recorded calls, that nothing was written to for `max_age` seconds.

        Returns how many.
        """
        removed = 0
        for folder in (*self.root.glob("*/run.json"), *self.root.glob("recordings/*/0.safetensors")):
            folder = folder.parent
            newest = max((f.stat().st_mtime for f in folder.glob("*")), default=time.time())
            if time.time() - newest > max_age:
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed


STORE = RunStore()
