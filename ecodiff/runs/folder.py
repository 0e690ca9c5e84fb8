"""A run is a folder: what was asked, the state of learning, the scores. It survives a kill.

run.json              model, configuration, prompts; written once
state.safetensors     where learning is, replaced atomically
scores.safetensors    the ranking so far; final once all steps are done
text_encoders.safetensors  the ranking of text encoders, if some of them is to go
plan.safetensors      a plan that was brought, instead of a ranking
plans/, models/       what was cut from it
variants/             weights that compensation gave, by plan
pictures.json         what was drawn with it (see `runs.pictures`)
STOP, ERROR, MEMORY   a request to stop; why it last failed; what is kept in memory
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout

from .. import catalog
from ..config import CompensateConfig, LearnConfig
from ..errors import BudgetError, CheckpointError, RunError
from ..learning.state import LearnState
from ..pruning.plan import PrunePlan
from ..pruning.scores import Scores
from ..storage import write_json

RUN_FORMAT = "ecodiff.run.1"
TEXT_ENCODERS = "text_encoders.safetensors"


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
    heldout: list[str] = field(default_factory=list)  # of a person's own prompts, those to judge by
    calls = 0  # of the denoiser, in the step that this object works on

    @property
    def id(self) -> str:
        return self.folder.name

    @classmethod
    def create(cls, folder: Path, model: str, config: LearnConfig, prompts, preset="", heldout=()) -> "Run":
        """Start a new run in `folder`.

        Args:
            prompts, heldout: to learn on, and to judge by; none: the model's.

        Raises:
            RunError: there is a run already, or the folder holds something else.
            CheckpointError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunError(f"{folder} exists and is not empty. Name a new folder for the run.")
        run = cls(folder, model, config, list(prompts), preset, time.time(), heldout=list(heldout))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run.save()
        except OSError as error:
            raise CheckpointError(f"Could not create the run in {folder}: {error}.") from None
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

    @cached_property
    def known(self) -> catalog.Model:
        """The dense model that it is about."""
        return catalog.find(self.model)

    @property
    def learned_on(self) -> list[str]:
        """The prompts of learning, repairing and healing."""
        return self.prompts or self.known.prompts("calibration")

    @property
    def compensation(self) -> CompensateConfig:
        """How the weights of what is cut are repaired: what was asked of learning holds for that too."""
        asked = () if self.imported else ("inference_steps", "guidance_scale", "size", "extra")
        same = replace(self.known.compensation(), **{name: getattr(self.config, name) for name in asked})
        return same.on(self.config.repair) if self.config.repair else same

    @property
    def judged_on(self) -> list[str]:
        """Prompts that nothing is learned on."""
        return self.heldout or self.known.prompts("heldout")

    @property
    def touched(self) -> float:
        """When something was last written to it, in seconds since 1970."""
        return max(file.stat().st_mtime for file in self.folder.glob("*"))

    def save(self) -> None:
        """Write run.json atomically."""
        about = asdict(self) | {"format": RUN_FORMAT}
        del about["folder"]
        write_json(self.folder / "run.json", about)

    def state(self) -> LearnState | None:
        path = self.folder / "state.safetensors"
        return LearnState.load(path) if path.exists() else None

    def scores(self) -> Scores:
        """The ranking as far as it is learned. Raises CheckpointError if there is none yet."""
        return Scores.load(self.folder / "scores.safetensors")

    @property
    def size(self) -> float | None:
        """The one ratio of a run made of a plan; None where any can be cut."""
        file = self.folder / "plan.safetensors"
        return PrunePlan.load(file).metadata["ratio"] if file.exists() else None

    def plan(
        self,
        ratio: float | None = None,
        units: Mapping[str, float] | None = None,
        cost: str = "params",
        align: bool | int = True,
        milliseconds: tuple[Mapping[str, float], float] | None = None,
    ) -> PrunePlan:
        """What stays at a size. Milliseconds: nothing is learned again.

        Args:
            ratio: fraction of the denoiser's parameters to remove; None: what the run was learned for,
                or the size of its plan.
            units: in place of it, of each kind the fraction of its units to remove.
            cost: what the ratio is of: "params", or of a run that counted them "macs".
            milliseconds: what it is of in place of that: those of a unit, by group, and of a whole call
                (`metrics.cost.unit_milliseconds`).
            align: as `Scores.plan` takes it.

        Raises:
            RunError: nothing is learned yet.
            BudgetError: the ratio is out of range, or not the one of the plan that the run was made of.
        """
        if (file := self.folder / "plan.safetensors").exists():
            return _of_its_size(PrunePlan.load(file), ratio, units)
        if not (self.folder / "scores.safetensors").exists():
            raise RunError("This run has no scores yet. Let it learn for a few steps first.")
        scores, size = self.scores(), self.config.ratio if ratio is None else ratio
        if milliseconds and not units:
            plan = scores.plan(ratio=size, costs=milliseconds, align=align)
        elif cost == "macs" and not units:
            plan = scores.plan(macs=round((1 - size) * scores.total_macs), align=align)
        else:
            plan = scores.plan(units=units) if units else scores.plan(ratio=size, align=align)
        plan.metadata |= {"model": self.model}
        if self.config.text_encoders and (self.folder / TEXT_ENCODERS).exists():
            encoders = Scores.load(self.folder / TEXT_ENCODERS)
            plan = plan.joined(cut_text_encoders(encoders, self.config.text_encoders))
        if self.prompts and self.prompts != self.known.prompts("calibration"):
            plan.metadata |= {"prompts": f"{len(self.prompts)} of the person who pruned it"}
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

    def forget_error(self) -> None:
        (self.folder / "ERROR").unlink(missing_ok=True)

    def note_memory(self, words: str) -> None:
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


def _of_its_size(plan: PrunePlan, ratio: float | None, units: Mapping[str, float] | None) -> PrunePlan:
    """The plan that a run was made of. Raises BudgetError if another size is asked for."""
    size = plan.metadata["ratio"]
    if units is not None:
        raise BudgetError(f"This run was made of a plan, which has one size: {size:.1%} removed.")
    if ratio is not None and abs(ratio - size) > 0.005:
        raise BudgetError(
            f"This run was made of a plan, which has one size: {size:.1%} of the denoiser removed. "
            f"{ratio:.1%} was asked for; ask for {size:.3f}, or learn a run of your own."
        )
    return plan


def cut_text_encoders(scores: Scores, ratio: float) -> PrunePlan:
    """What of text encoders stays if `ratio` of their parameters goes.

    Raises:
        BudgetError: that much is not in their heads and FFN neurons.
    """
    try:
        return scores.plan(ratio=ratio)
    except BudgetError as error:
        raise BudgetError(f"Text encoders: {error}") from None


def _check(run: Run) -> None:
    """Raise TypeError unless what a run.json said is of the right kinds."""
    words = (run.model, run.preset, run.name, run.visitor, *run.prompts, *run.heldout)
    numbers = (run.created, run.config.total_steps)
    if (
        not isinstance(run.prompts, list)
        or not isinstance(run.heldout, list)
        or not all(isinstance(word, str) for word in words)
    ):
        raise TypeError("its words are no words")
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise TypeError("its numbers are no numbers")
