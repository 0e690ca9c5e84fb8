"""Settings: how masks are learned, weights repaired and pruned models healed."""

from dataclasses import dataclass, field, fields, replace

from .errors import BudgetError
from .units import ALL_KINDS, PRESET_KINDS

HEAL_RATE, HEAL_REPAIR = 1e-3, 256


def check_seed(seed: int) -> int:
    """The seed. Raises BudgetError unless torch can take it: 0 to 2**64 - 1."""
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise BudgetError(f"A seed is a whole number from 0 to 2**64 - 1 (18446744073709551615), not {seed}.")
    return seed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The trajectories that something is measured or learned on.

    Attributes:
        batch: trajectories at a time.
        inference_steps: time steps of a trajectory; None: the pipeline's default.
        guidance_scale: None: the pipeline's default.
        size: height and width of the image in pixels; None: the pipeline's default.
        extra: more arguments of the pipeline's call.
        seed: of prompts and noise.
    """

    batch: int = 4
    inference_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    extra: dict = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self):
        check_seed(self.seed)
        for name, least in (("batch", 1), ("inference_steps", 1), ("size", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BudgetError(f"{name} is {value}; it is at least {least}.")

    def sampling(self) -> dict:
        """These settings by name, for other settings on the same trajectories."""
        return {entry.name: getattr(self, entry.name) for entry in fields(Sampling)}


@dataclass(frozen=True, kw_only=True)
class CompensateConfig(Sampling):
    """How the statistics of a closed-form repair are gathered. Besides those of `Sampling`:

    Attributes:
        trajectories: dense trajectories, each from a prompt and a seed of its own.
        heldout: how many of them only check what the others gave.
        calls: denoiser calls kept of each batch, evenly spread over the time steps.
        memory: bytes of statistics at a time; more passes over the calls are made if it does not
            suffice for all layers, down to one layer a pass.
        damping: e, as a fraction of the mean variance of a feature of x'.
    """

    trajectories: int = 40
    heldout: int = 8
    calls: int = 6
    memory: int = 2 << 30
    damping: float = 0.05

    @property
    def batches(self) -> list[range]:
        """Numbers of the trajectories in each batch."""
        starts = range(0, self.trajectories, self.batch)
        return [range(first, min(first + self.batch, self.trajectories)) for first in starts]

    def on(self, trajectories: int) -> "CompensateConfig":
        """The same on so many trajectories, of which an eighth, and a batch at least, only checks.

        Raises:
            BudgetError: these are fewer than two batches.
        """
        if trajectories < 2 * self.batch:
            raise BudgetError(
                f"A repair takes two batches of trajectories at least ({2 * self.batch}), not {trajectories}."
            )
        heldout = max(self.batch, trajectories // 8)
        return replace(self, trajectories=trajectories, heldout=heldout)


@dataclass(frozen=True, kw_only=True)
class LearnConfig(Sampling):
    """What a run does. Everything that its result depends on, besides model and prompts.

    Attributes, besides those of `Sampling`:
        ratio: budget that learning steers to: fraction of the denoiser's parameters to remove. The
            scores can then be cut at any size; they are best near this one.
        warm_steps: batches of trajectories for the Gauss-Newton warm start.
        steps: mask learning steps after it.
        trajectories: distinct (prompt, seed) pairs that steps draw from.
        rate: Adam's learning rate on log-alpha.
        kinds: the units to prune, names of `units.KINDS`.
        cost: what the budget counts, "params", "macs" or "ms" (measured on this machine when the run
            starts or resumes: such a run is not repeatable to the bit); `ratio` is a share of that.
        penalty: None steers the expected size to the budget. A number is the paper's own objective
            instead: gates start from a constant, none warm, and this weighs the mean |log-alpha|.
        checkpoint: recompute each time step in the backward pass (memory does not grow with steps);
            False: none; None: as many as memory asks for. Scores do not depend on it.
        method: None: what the steps above say. Else a name of `learning.scoring.METHODS`, whose scores
            are computed in one step on `warm_steps` batches.
        repair: dense trajectories that the weights of what is cut are repaired by; None: as many as
            `CompensateConfig` says.
        text_encoders: fraction of the parameters of all text encoders to remove besides, 0 to 1. They are
            ranked by the embeddings that they give (`learning.text_encoders`), before learning starts.
    """

    ratio: float = 0.2
    warm_steps: int = 16
    steps: int = 8
    trajectories: int = 256
    rate: float = 0.05
    kinds: tuple[str, ...] = PRESET_KINDS
    cost: str = "params"
    penalty: float | None = None
    checkpoint: bool | None = None
    method: str | None = None
    repair: int | None = None
    text_encoders: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "kinds", tuple(self.kinds))  # JSON gives a list
        if min(self.batch, self.trajectories) < 1 or self.steps < 0:
            raise BudgetError("batch and trajectories must be at least 1, steps at least 0.")
        if self.warm_steps < 1 and (self.penalty is None or self.steps < 1):
            raise BudgetError("Give at least one warm step (or a penalty, and steps to learn with it).")
        if self.repair is not None:
            CompensateConfig().on(self.repair)  # refused now, not once it is cut
        if not 0 <= self.text_encoders < 1:
            raise BudgetError(
                f"text_encoders is the fraction of their parameters to remove, not {self.text_encoders}."
            )
        if self.cost not in ("params", "macs", "ms"):
            raise BudgetError(f"cost is 'params', 'macs' or 'ms', not {self.cost!r}.")
        unknown = set(self.kinds) - set(ALL_KINDS)
        if unknown or not set(self.kinds) & set(ALL_KINDS):
            raise BudgetError(f"kinds are some of {', '.join(ALL_KINDS)}, not {self.kinds}.")
        if {"modulation", "modulation_directions"} <= set(self.kinds):
            raise BudgetError(
                "Modulation rows and modulation directions are the same parameters: choose one."
            )

        inside = {"value_directions", "query_directions"} & set(self.kinds)
        if inside and ("heads" not in self.kinds or not self.method):
            raise BudgetError(
                "Directions inside heads are ranked together with heads, and by a scoring method (surgeon)."
            )

    @classmethod
    def preset(cls, name: str, **changes) -> "LearnConfig":
        """One of "fast", "balanced", "paper", "ecodiff", "thorough", or a scoring method, with some fields
        changed.

        Raises:
            BudgetError: there is no such preset.
        """
        if name not in PRESETS:
            raise BudgetError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
        return replace(cls(**PRESETS[name]), **changes)

    @property
    def total_steps(self) -> int:
        return 1 if self.method else self.warm_steps + self.steps


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


@dataclass(frozen=True, kw_only=True)
class HealConfig(Sampling):
    """How long a pruned model is healed, and how. Besides those of `Sampling`:

    Attributes:
        repair: dense trajectories that weights are repaired by first, in closed form; 0: none.
        steps: of the optimizer, after that; 0: none.
        trajectories: distinct (prompt, seed) pairs that steps draw from.
        rank: of the updates.
        rate: AdamW's peak learning rate; it falls to zero along a cosine.
    """

    repair: int = HEAL_REPAIR
    steps: int = 100
    trajectories: int = 512
    rank: int = 16
    rate: float = HEAL_RATE

    def __post_init__(self):
        super().__post_init__()
        if min(self.batch, self.rank) < 1 or not 0 < self.rate < 1:
            raise BudgetError("batch and rank are at least 1, and the rate is between 0 and 1.")
        if min(self.steps, self.repair) < 0 or not self.steps + self.repair:
            raise BudgetError("Healing needs trajectories to repair by, or steps.")
        if self.trajectories < self.batch or 0 < self.repair < 2 * self.batch:
            raise BudgetError(
                "Healing needs at least as many trajectories as a batch has, and twice as many to repair by."
            )

    @property
    def compensation(self) -> CompensateConfig:
        """How the repair is made."""
        return CompensateConfig(**self.sampling()).on(self.repair)

    @property
    def batches(self) -> int:
        """Batches of trajectories that are recorded for the repair."""
        return len(self.compensation.batches) if self.repair else 0

    @property
    def checked(self) -> range:
        """Numbers of the batches of trajectories that weights are checked on, and not trained."""
        first = -(-self.trajectories // self.batch)
        return range(first, first + max(1, self.trajectories // 8 // self.batch))

    @property
    def total_steps(self) -> int:
        """Batches that are recorded, and steps."""
        return self.batches + self.steps
