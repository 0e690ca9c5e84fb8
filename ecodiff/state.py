"""What a run of learning asks for, and where it is: small, on disk, and enough to go on from."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import BudgetError, CheckpointError
from .units import ALL_KINDS, PRESET_KINDS

STATE_FORMAT = "ecodiff.state.1"


@dataclass(frozen=True)
class LearnConfig:
    """What a run does. Everything that its result depends on, besides model and prompts.

    Attributes:
        ratio: budget that learning steers to: fraction of the denoiser's parameters to remove. The
            scores can then be cut at any size; they are best near this one.
        warm_steps: batches of trajectories for the Gauss-Newton warm start.
        steps: mask learning steps after it.
        batch: trajectories a step.
        trajectories: distinct (prompt, seed) pairs that steps draw from.
        inference_steps: time steps of a trajectory; None: the pipeline's default.
        guidance_scale: None: the pipeline's default.
        size: height and width of the image in pixels; None: the pipeline's default.
        extra: more arguments of the pipeline's call.
        rate: Adam's learning rate on log-alpha.
        seed: of prompts, latents and gates.
        kinds: which units may go: "heads", "ffn", "resnet", "modulation" (rows of AdaLN: memory, no
            time), and "blocks" (whole transformer blocks, each with a gate on top of its units').
        cost: what the budget counts, "params", "bytes" (the same share), "macs" or "ms" (measured on
            this machine when the run starts or resumes: such a run is not repeatable to the bit);
            `ratio` is a share of that.
        penalty: None steers the expected size to the budget. A number is the paper's own objective
            instead: gates start from a constant, none warm, and this weighs the mean |log-alpha|.
        checkpoint: recompute each time step in the backward pass (memory does not grow with steps);
            False: none; None: as many as memory asks for. Scores do not depend on it.
    """

    ratio: float = 0.2
    warm_steps: int = 16
    steps: int = 8
    batch: int = 4
    trajectories: int = 256
    inference_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    extra: dict = field(default_factory=dict)
    rate: float = 0.05
    seed: int = 0
    kinds: tuple[str, ...] = PRESET_KINDS
    cost: str = "params"
    penalty: float | None = None
    checkpoint: bool | None = None

    def __post_init__(self):
        object.__setattr__(self, "kinds", tuple(self.kinds))  # JSON gives a list
        if min(self.batch, self.trajectories) < 1 or self.steps < 0:
            raise BudgetError("batch and trajectories must be at least 1, steps at least 0.")
        if self.warm_steps < 1 and (self.penalty is None or self.steps < 1):
            raise BudgetError("Give at least one warm step (or a penalty, and steps to learn with it).")
        if self.cost not in ("params", "bytes", "macs", "ms"):
            raise BudgetError(f"cost is 'params', 'bytes', 'macs' or 'ms', not {self.cost!r}.")
        unknown = set(self.kinds) - {*ALL_KINDS, "blocks"}
        if unknown or not set(self.kinds) & set(ALL_KINDS):
            raise BudgetError(f"kinds are some of {', '.join(ALL_KINDS)} and blocks, not {self.kinds}.")

    @classmethod
    def preset(cls, name: str, **changes) -> "LearnConfig":
        """One of "fast", "balanced", "paper", with some fields changed."""
        if name not in PRESETS:
            raise BudgetError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
        return replace(cls(**PRESETS[name]), **changes)

    @property
    def total_steps(self) -> int:
        return self.warm_steps + self.steps


# "paper" takes as many trajectories as the paper: 100 steps of 4. How they are divided, and what fewer
# cost, is in benchmarks/ablation.json: samples for the warm start are worth more than learning steps.
PRESETS: dict[str, dict] = {
    "fast": {"warm_steps": 12, "steps": 4},
    "balanced": {"warm_steps": 20, "steps": 5},
    "paper": {"warm_steps": 36, "steps": 64},
    "ecodiff": {  # as published: the official configuration for SDXL
        "warm_steps": 0,
        "steps": 100,
        "penalty": 0.5,
        "rate": 0.1,
        "trajectories": 400,
        "kinds": ("heads", "ffn"),
    },
}


@dataclass
class LearnState:
    """Where a run is. `vectors` are float32 (units,) in network order."""

    step: int
    vectors: dict[str, Tensor]  # saliency, log_alpha, and Adam's moments
    multiplier: float = 0.0  # price of the expected size, in loss per parameter share
    history: list[dict] = field(default_factory=list)  # one row of plain numbers a step

    @classmethod
    def start(cls, units: int) -> "LearnState":
        names = ("saliency", "log_alpha", "mean", "square")
        return cls(0, {name: torch.zeros(units) for name in names})

    def save(self, path: str | Path) -> None:
        """Write the state atomically: a reader finds the old file or the new one, whole."""
        about = {"step": self.step, "multiplier": self.multiplier, "history": self.history}
        header = {"format": STATE_FORMAT, "about": json.dumps(about)}
        path = Path(path)
        partial = path.with_suffix(".partial")
        try:
            save_file(self.vectors, partial, metadata=header)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"Could not save the run to {path}: {error}. Make room on the disk and resume; "
                "the last saved step is kept."
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> "LearnState":
        """Read a state. Raises CheckpointError if the file is not one."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != STATE_FORMAT:
                    raise ValueError(f"its format is {header.get('format')!r}")
                about = json.loads(header["about"])
                vectors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(about["step"], vectors, about["multiplier"], about["history"])
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is not a saved state of a run: {error}.") from None
