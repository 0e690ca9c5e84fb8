"""Learning which units matter, end to end over whole trajectories (EcoDiff, arXiv 2412.02852).

The state is small (a log-alpha a unit, Adam's moments, a few counters) and every step draws from
generators seeded by its own number. So a run can be stopped, killed and resumed anywhere, and ends
with the same scores, bit for bit, as one that was left alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, log
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import gates, saliency
from .errors import BudgetError, CheckpointError, LearningError
from .groups import denoiser_of, find_groups, unit_parameters
from .plan import Scores
from .trajectory import call_options, trajectory

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
        rate: Adam's learning rate on log-alpha.
        seed: of prompts, latents and gates.
        checkpoint: recompute each time step in the backward pass (memory does not grow with steps).
    """

    ratio: float = 0.2
    warm_steps: int = 16
    steps: int = 8
    batch: int = 4
    trajectories: int = 256
    inference_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    rate: float = 0.05
    seed: int = 0
    checkpoint: bool = True

    def __post_init__(self):
        if min(self.warm_steps, self.batch, self.trajectories) < 1 or self.steps < 0:
            raise BudgetError("warm_steps, batch and trajectories must be at least 1, steps at least 0.")

    @classmethod
    def preset(cls, name: str, **changes) -> "LearnConfig":
        """One of "fast", "balanced", "paper", with some fields changed."""
        if name not in PRESETS:
            raise BudgetError(f"There is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
        return replace(cls(**PRESETS[name]), **changes)

    @property
    def total_steps(self) -> int:
        return self.warm_steps + self.steps


# The paper makes 100 updates of 4 trajectories. On emoji-sdxl samples for the warm start are worth more
# than learning steps: at 20 %, 16 batches instead of 8 cut the error to a third.
PRESETS: dict[str, dict] = {
    "fast": {"warm_steps": 16, "steps": 8},
    "balanced": {"warm_steps": 32, "steps": 25},
    "paper": {"warm_steps": 64, "steps": 100},
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


class _Learner:
    """A pipeline, its groups and the prompts: computes one step from the state before it."""

    def __init__(self, pipe, prompts: Sequence[str], config: LearnConfig, on_step):
        self.pipe, self.prompts, self.config, self.on_step = pipe, list(prompts), config, on_step
        self.denoiser = denoiser_of(pipe)
        self.groups = find_groups(self.denoiser)
        self.sizes = [group.size for group in self.groups]
        self.total = sum(p.numel() for p in self.denoiser.parameters())
        costs = [unit_parameters(self.denoiser, group) for group in self.groups]
        shares = torch.tensor(costs, dtype=torch.float32) / self.total
        self.shares = shares.repeat_interleave(torch.tensor(self.sizes))  # of the denoiser, a unit
        self.targets: dict[int, Tensor] = {}
        ceiling = float(self.shares.sum())
        self.budget = ceiling - config.ratio  # share of the denoiser that units may keep
        if not 0 < config.ratio < ceiling:
            raise BudgetError(
                f"This model can give up between 0 and {ceiling:.1%} of its parameters (the rest "
                f"is not in heads or FFN neurons); {config.ratio:.1%} was asked for."
            )
        if not self.prompts:
            raise BudgetError("Learning needs at least one prompt.")

    def advance(self, state: LearnState) -> LearnState:
        config, vectors = self.config, {k: v.clone() for k, v in state.vectors.items()}
        state = LearnState(state.step, vectors, state.multiplier, list(state.history))
        if state.step < config.warm_steps:
            row = self._warm(state)
        else:
            row = self._learn(state)
        if not all(isfinite(v) for v in row.values()) or not all(
            v.isfinite().all() for v in vectors.values()
        ):
            raise LearningError(
                f"Step {state.step + 1} gave values that are not numbers. The state before it is "
                "kept. Try float32 or bfloat16 instead of float16, or another seed."
            )
        state.step += 1
        state.history.append({"step": state.step, **row})
        if state.step == config.warm_steps:
            self._start_gates(state)
        return state

    def _call(self, batch: int) -> dict:
        """The pipeline's arguments for one of the run's batches of (prompt, seed) pairs."""
        config = self.config
        shuffle = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(len(self.prompts), generator=shuffle).tolist()
        rows = range(batch * config.batch, (batch + 1) * config.batch)
        seeds = [config.seed * 1_000_003 + row for row in rows]
        return {
            "prompt": [self.prompts[order[row % len(order)]] for row in rows],
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            **call_options(self.pipe, config.inference_steps, config.guidance_scale, config.size),
        }

    def _batch_of(self, step: int) -> int:
        return step % max(1, self.config.trajectories // self.config.batch)

    def _warm(self, state: LearnState) -> dict:
        """One Gauss-Newton sample of every unit's importance."""
        squares = saliency.gauss_newton_sample(
            self.pipe,
            self.groups,
            self._call(self._batch_of(state.step)),
            seed=self.config.seed * 1_000_003 + state.step,
            checkpoint=self.config.checkpoint,
            on_step=self.on_step,
        )
        state.vectors["saliency"] += torch.cat([squares[g.name] for g in self.groups])
        return {}

    def _start_gates(self, state: LearnState) -> None:
        """Log-alphas and the multiplier from the saliency.

        A unit is worth keeping if removing it costs more, per parameter, than the budget's price.
        The price is that of the first unit that stays; log-alpha is the log of the ratio, shifted
        so that the expected size is the budget.
        """
        worth = state.vectors["saliency"] / self.config.warm_steps / self.shares
        ranked, order = worth.sort(stable=True)
        gone = self.shares[order].cumsum(0) < self.config.ratio
        price = float(ranked[int(gone.sum())].clamp_min(1e-20))
        state.multiplier = price
        start = (worth.clamp_min(1e-20).log() - log(price)).clamp(-6, 6)
        low, high = -12.0, 12.0
        for _ in range(40):
            shift = (low + high) / 2
            over = self._expected(start + shift) > self.budget
            low, high = (low, shift) if over else (shift, high)
        state.vectors["log_alpha"] = start + shift

    def _expected(self, log_alpha: Tensor) -> Tensor:
        """Expected share of the denoiser's parameters in units that stay."""
        return (self.shares * gates.open_probability(log_alpha)).sum()

    def _learn(self, state: LearnState) -> dict:
        """One Adam step on loss + multiplier * expected size, and one on the multiplier."""
        config, vectors = self.config, state.vectors
        batch = self._batch_of(state.step)
        target = self._target(batch)
        log_alpha = vectors["log_alpha"].clone().requires_grad_()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
        gate = gates.sample(log_alpha, torch.rand(log_alpha.shape, generator=generator))
        masks = dict(zip((g.name for g in self.groups), gate.split(self.sizes), strict=True))
        with (
            gates.masked(self.denoiser, masks),
            trajectory(self.pipe, config.checkpoint, self.on_step) as run,
        ):
            z0 = run(**self._call(batch)).float()
            loss = (z0 - target).square().mean() / target.var()
            size = self._expected(log_alpha)
            (gradient,) = torch.autograd.grad(loss + state.multiplier * size, log_alpha)
        updates = state.step - config.warm_steps + 1
        _adam(vectors, gradient, config.rate, updates)
        # Dual ascent: the price rises while the expected size is above the budget.
        over = float(size.detach()) - self.budget
        state.multiplier *= max(0.8, min(1.25, 1 + 10 * over))
        removed = float(self.shares.sum() - size.detach())
        return {"loss": float(loss.detach()), "expected": removed}

    def _target(self, batch: int) -> Tensor:
        """z_0 of the dense model for a batch, computed once."""
        if batch not in self.targets:
            with trajectory(self.pipe, False, self.on_step) as run, torch.no_grad():
                self.targets[batch] = run(**self._call(batch)).float()
        return self.targets[batch]

    def scores(self, state: LearnState) -> Scores:
        config, learned = self.config, state.step > self.config.warm_steps
        vector = state.vectors["log_alpha"]
        if state.step < config.warm_steps:
            vector = state.vectors["saliency"] / self.shares
        parts = dict(zip((g.name for g in self.groups), vector.split(self.sizes), strict=True))
        facts = {"method": "learned" if learned else "gauss-newton", "steps": state.step}
        return Scores.of(self.denoiser, parts, **facts, learn=asdict(config))


def _adam(vectors: dict[str, Tensor], gradient: Tensor, rate: float, updates: int) -> None:
    mean, square = vectors["mean"], vectors["square"]
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.01)
    scale = (square / (1 - 0.99**updates)).sqrt() + 1e-12
    vectors["log_alpha"] -= rate * (mean / (1 - 0.9**updates)) / scale


def learn(
    pipe,
    prompts: Sequence[str],
    config: LearnConfig,
    state: LearnState | None = None,
    *,
    on_step: Callable[[], None] | None = None,
    device_lock: AbstractContextManager | None = None,
) -> Iterator[tuple[LearnState, Scores]]:
    """Learn masks, yielding the state after each step and the scores that it amounts to.

    Args:
        pipe: the dense pipeline; its weights are not changed.
        prompts: calibration prompts; no images are needed.
        state: where to go on; None: at the beginning.
        on_step: called before every denoiser call; raise in it to stop. The step is then lost, not
            the run.
        device_lock: held during each step, so that others can use the pipeline between them.

    Raises:
        BudgetError: the ratio is out of the model's range, or there are no prompts.
        CheckpointError: `state` belongs to another model.
        LearningError: the loss is not a number.
    """
    learner = _Learner(pipe, prompts, config, on_step)
    state = state or LearnState.start(sum(learner.sizes))
    if any(v.shape != (sum(learner.sizes),) for v in state.vectors.values()):
        raise CheckpointError("The saved state has another number of units than this model.")
    while state.step < config.total_steps:
        with device_lock or nullcontext():
            state = learner.advance(state)
        yield state, learner.scores(state)


def learn_masks(
    pipe,
    prompts: Sequence[str],
    config: LearnConfig | None = None,
    callback: Callable[[LearnState], None] | None = None,
) -> Scores:
    """Learn masks from beginning to end and return the scores.

    Args:
        pipe: the dense pipeline.
        prompts: calibration prompts.
        callback: called with the state after every step.

    Example:
        >>> scores = ecodiff.learn_masks(pipe, ["a red apple", "a cat"], ecodiff.LearnConfig())
        >>> small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
    """
    scores = None
    for state, scores in learn(pipe, prompts, config or LearnConfig()):  # noqa: B007 - the last is returned
        if callback is not None:
            callback(state)
    return scores
