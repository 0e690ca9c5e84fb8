"""Learning which units matter, end to end over whole trajectories (EcoDiff, arXiv 2412.02852).

The state is small (a log-alpha a unit, Adam's moments, a few counters) and every step draws from
generators seeded by its own number. So a run can be stopped, killed and resumed anywhere, and ends
with the same scores, bit for bit, as one that was left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from math import inf, isfinite, log

import torch
from torch import Tensor

from .. import machine
from ..architectures import blocks, find_groups, unit_parameters
from ..config import LearnConfig
from ..errors import BudgetError, CheckpointError, LearningError, exhausted
from ..learning import distributed, memory, scoring
from ..metrics import cost
from ..pipelines import call_options, denoiser_of, prompt_rows
from ..pruning import gates, masking
from ..pruning.scores import Scores
from ..units import WORDS
from .checkpointing import ALL, NOTHING, Keep, gradients
from .encodings import Encodings
from .state import LearnState
from .trajectory import trajectory

# Of the official SDXL configuration: log-alpha at the start, temperature of the gates, and eps,
# which bounds their noise to |log((u + eps) / (1 - u + eps))| <= log((1 + eps) / eps).
PUBLISHED_START, PUBLISHED_TEMPERATURE, PUBLISHED_EPS = 3.0, 0.83, 0.5

OPEN = 6.0  # log-alpha at which a gate is as good as open; closed at minus that


class _Learner:
    """A pipeline, its groups and the prompts: computes one step from the state before it."""

    def __init__(self, pipe, prompts: Sequence[str], config: LearnConfig, on_step, on_plan):
        self.pipe, self.prompts, self.config = pipe, list(prompts), config
        self.on_step, self.on_plan = on_step, on_plan
        self.memory: memory.MemoryPlan | None = None
        self.encodings = Encodings(pipe)
        self.counted = 0  # denoiser calls of a step, recomputed ones too
        self.calls = 0  # of one trajectory; 0: not known yet
        self.denoiser = denoiser_of(pipe)
        self.groups = find_groups(self.denoiser, set(config.kinds) - {"blocks"})
        self.blocks = blocks(self.groups) if "blocks" in config.kinds else {}
        self.names = [group.name for group in self.groups]
        self.sizes = [group.size for group in self.groups]
        if not self.prompts:
            raise BudgetError("Learning needs at least one prompt.")
        self.params = {g.name: unit_parameters(self.denoiser, g) for g in self.groups}
        self.macs = cost.unit_macs(pipe, self._call(0), self.groups) if config.cost == "macs" else None
        costs, total = self.macs or (self.params, cost.parameters(self.denoiser))
        if config.cost == "ms":
            costs, total = cost.unit_milliseconds(pipe, self._call(0), self.groups)
        self.costs = costs
        shares = torch.tensor([costs[g.name] for g in self.groups], dtype=torch.float32) / total
        self.shares = shares.repeat_interleave(torch.tensor(self.sizes))  # of the denoiser, a unit
        names = [g.name for g in self.groups for _ in range(g.size)]
        where = {name: row for row, members in enumerate(self.blocks.values()) for name in members}
        self.block_of = torch.tensor([where.get(name, len(self.blocks)) for name in names])  # last: none
        self.targets: dict[int, tuple[Tensor, Tensor]] = {}  # and their variance
        ceiling = float(self.shares.sum())
        self.budget = ceiling - config.ratio  # share of the denoiser that units may keep
        if not 0 < config.ratio < ceiling:
            words = " or ".join(WORDS[kind] for kind in WORDS if kind in config.kinds)
            raise BudgetError(
                f"This model can give up between 0 and {ceiling:.1%} of its {config.cost} (the rest "
                f"is not in {words}); {config.ratio:.1%} was asked for."
            )

    @property
    def variables(self) -> int:
        """Gates: one a unit, then one a block."""
        return sum(self.sizes) + len(self.blocks)

    def _blocks_open(self, opened: Tensor) -> Tensor:
        """Of each unit's block, its value in `opened` (units, then blocks); 1 where there is none."""
        return torch.cat([opened[sum(self.sizes) :], opened.new_ones(1)])[self.block_of]

    def advance(self, state: LearnState) -> LearnState:
        """The state one step on. Where memory runs out, the step is made again with less of it."""
        if self.memory is None and self.config.checkpoint is None:
            self._plan(memory.plan(self.pipe, self._call(0), self.groups, encoders=self.encodings.bytes))
        while True:
            self.counted = 0
            try:
                with self.encodings.used(self._keep().alone):
                    made = self._advance(state)
                break
            except (MemoryError, RuntimeError) as error:
                smaller = self.memory.smaller() if self.memory and exhausted(error) else None
                if smaller is None:
                    raise
            self._plan(smaller)
            machine.release()
        if self.memory and not self.memory.calls and self.calls:
            self._plan(memory.fitted(replace(self.memory, calls=self.calls)))
        return made

    def _plan(self, found: memory.MemoryPlan) -> None:
        self.memory = found
        if self.on_plan is not None:
            self.on_plan(found.words())

    def _keep(self) -> Keep:
        if self.memory is None:
            return NOTHING if self.config.checkpoint else ALL
        return self.memory.keep

    def _on_step(self) -> None:
        self.counted += 1
        if self.on_step is not None:
            self.on_step()

    def _advance(self, state: LearnState) -> LearnState:
        config, vectors = self.config, {k: v.clone() for k, v in state.vectors.items()}
        state = LearnState(state.step, vectors, state.multiplier, list(state.history))
        if config.warm_steps == state.step == 0:
            vectors["log_alpha"].fill_(PUBLISHED_START)
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
        rows = range(batch * config.batch, (batch + 1) * config.batch)[distributed.share(config.batch)]
        options = call_options(
            self.pipe, config.inference_steps, config.guidance_scale, config.size, config.extra
        )
        return prompt_rows([self.prompts[i] for i in order], rows, config.seed, options)

    def _batch_of(self, step: int) -> int:
        return step % max(1, self.config.trajectories // self.config.batch)

    def _warm(self, state: LearnState) -> dict:
        """One Gauss-Newton sample of every unit's importance."""
        squares = scoring.gauss_newton_sample(
            self.pipe,
            self.groups,
            self._call(self._batch_of(state.step)),
            seed=self.config.seed * 1_000_003 + state.step,
            checkpoint=self._keep(),
            on_step=self._on_step,
            blocks=self.blocks,
            rows=distributed.share(self.config.batch),
        )
        if self._keep().recomputed == inf:
            self.calls = self.counted // 2  # each was made twice
        found = torch.cat([squares[name] for name in (*self.names, *self.blocks)])
        state.vectors["saliency"] += distributed.mean(found)
        return {}

    def _worth(self, state: LearnState) -> Tensor:
        """Saliency per share of the cost, of units and blocks."""
        whole = self.shares.new_zeros(len(self.blocks) + 1).index_add_(0, self.block_of, self.shares)
        shares = torch.cat([self.shares, whole[: len(self.blocks)]])
        return (
            state.vectors["saliency"]
            / max(1, min(state.step, self.config.warm_steps))
            / shares.clamp_min(1e-12)
        )

    def _prior(self, state: LearnState) -> tuple[Tensor, float]:
        """Log of each unit's worth in units of the budget's price, and the price.

        A unit is worth keeping if removing it costs more, per parameter, than the price, which is
        what the first unit that stays is worth.
        """
        worth = self._worth(state)
        ranked, order = worth[: len(self.shares)].sort(stable=True)
        gone = self.shares[order].cumsum(0) < self.config.ratio
        price = float(ranked[int(gone.sum())].clamp_min(1e-20))
        return worth.clamp_min(1e-20).log() - log(price), price

    def _start_gates(self, state: LearnState) -> None:
        """Log-alphas from the prior, shifted so that the expected size is the budget."""
        prior, state.multiplier = self._prior(state)
        start = prior.clamp(-OPEN, OPEN)
        low, high = -12.0, 12.0
        for _ in range(40):
            shift = (low + high) / 2
            over = self._expected(start + shift) > self.budget
            low, high = (low, shift) if over else (shift, high)
        state.vectors["log_alpha"] = start + shift

    def _expected(self, log_alpha: Tensor) -> Tensor:
        """Expected share of the denoiser's cost in units that stay."""
        opened = gates.open_probability(log_alpha)
        return (self.shares * opened[: len(self.shares)] * self._blocks_open(opened)).sum()

    def _learn(self, state: LearnState) -> dict:
        """One Adam step on loss + multiplier * expected size, and one on the multiplier."""
        config, vectors = self.config, state.vectors
        batch = self._batch_of(state.step)
        log_alpha = vectors["log_alpha"].clone().requires_grad_()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + state.step)
        noise = torch.rand(log_alpha.shape, generator=generator)
        if config.penalty is None:
            gate = gates.sample(log_alpha, noise)
        else:
            noise = (noise + PUBLISHED_EPS) / (1 + 2 * PUBLISHED_EPS)
            gate = gates.sample(log_alpha, noise, PUBLISHED_TEMPERATURE)
        target, variance = self._target(batch)
        with trajectory(self.pipe, self._keep(), self._on_step) as run, self._masked(gate):
            z0 = run(**self._call(batch))
            loss = (z0.float() - target).square().mean() / variance
            size = self._expected(log_alpha)
            price = state.multiplier * size if config.penalty is None else self._penalty(log_alpha)
            (gradient,) = gradients(loss + price, z0, [log_alpha])
        gradient, loss = distributed.mean(gradient), distributed.mean(loss.detach())
        updates = state.step - config.warm_steps + 1
        _adam(vectors, gradient, config.rate, updates)
        # Dual ascent: the price rises while the expected size is above the budget.
        over = float(size.detach()) - self.budget
        state.multiplier *= max(0.8, min(1.25, 1 + 10 * over))
        row = {"loss": float(loss), "expected": float(self.shares.sum() - size.detach())}
        if state.step + 1 == config.total_steps:
            row |= self._gap(vectors["log_alpha"], batch)
        return row

    def _penalty(self, log_alpha: Tensor) -> Tensor:
        """The paper's code: mean |log-alpha| of each layer, mean over layers, heads plus FFN."""
        parts = log_alpha.abs()[: len(self.shares)].split(self.sizes)
        means = {kind: [] for kind in self.config.kinds}
        for group, part in zip(self.groups, parts, strict=True):
            means[group.kind].append(part.mean())
        return self.config.penalty * sum(torch.stack(m).mean() for m in means.values() if m)

    def _masked(self, gate: Tensor):
        unit = gate[: len(self.shares)] * self._blocks_open(gate)
        return masking.masked(self.denoiser, dict(zip(self.names, unit.split(self.sizes), strict=True)))

    def _gap(self, log_alpha: Tensor, batch: int) -> dict:
        """Loss with the gates' medians and with the plan that is cut from them, on one batch."""
        losses, (target, variance) = {}, self._target(batch)
        size = {"ratio": self.config.ratio} if self.macs is None else {"macs": self._macs_left()}
        plan = self._cut(log_alpha).plan(**size)
        kept = torch.cat([plan[name].float() for name in self.names] + [torch.ones(len(self.blocks))])
        for name, gate in (("relaxed", gates.hard(log_alpha)), ("hardened", kept)):
            with trajectory(self.pipe, False, self._on_step) as run, self._masked(gate), torch.no_grad():
                error = (run(**self._call(batch)).float() - target).square().mean() / variance
                losses[name] = float(distributed.mean(error))
        return losses

    def _macs_left(self) -> int:
        return round((1 - self.config.ratio) * self.macs[1])

    def _target(self, batch: int) -> tuple[Tensor, Tensor]:
        """z_0 of the dense model for a batch, and the variance of all processes' share of it; found once."""
        if batch not in self.targets:
            before = self.counted
            with trajectory(self.pipe, False, self._on_step) as run, torch.no_grad():
                z0 = run(**self._call(batch)).float()
            self.calls = self.counted - before
            self.targets[batch] = z0, distributed.whole(z0).var()
        return self.targets[batch]

    def scores(self, state: LearnState) -> Scores:
        """The ranking so far. Log-alphas become worths: the exponential keeps their order."""
        config = self.config
        if state.step > config.warm_steps:
            log_alpha = state.vectors["log_alpha"]
            if config.warm_steps:  # what was beyond reach of learning still has its order
                prior, _ = self._prior(state)
                log_alpha = log_alpha + (prior - prior.clamp(-OPEN, OPEN))
            return self._cut(log_alpha, steps=state.step)
        worth = self._worth(state)
        return self._scores(worth, method="gauss-newton", steps=state.step)

    def _cut(self, log_alpha: Tensor, **facts) -> Scores:
        method = "learned" if self.config.penalty is None else "ecodiff, as published"
        return self._scores(log_alpha.exp(), method=method, **facts)

    def _scores(self, worth: Tensor, **facts) -> Scores:
        if self.costs is not self.params:  # worth per MAC or ms to worth per parameter, as Scores hold it
            per_unit = torch.tensor([self.costs[n] / self.params[n] for n in self.names])
            worth = worth.clone()
            worth[: len(self.shares)] *= per_unit.repeat_interleave(torch.tensor(self.sizes))
        parts = dict(zip(self.names, worth[: len(self.shares)].split(self.sizes), strict=True))
        whole = dict(zip(self.blocks, worth[len(self.shares) :].tolist(), strict=True))
        return Scores.of(self.denoiser, parts, self.macs, whole, **facts, learn=asdict(self.config))


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
    on_plan: Callable[[str], None] | None = None,
    device_lock: AbstractContextManager | None = None,
) -> Iterator[tuple[LearnState, Scores]]:
    """Learn masks, yielding the state after each step and the scores that it amounts to.

    Args:
        pipe: the dense pipeline; its weights are not changed.
        prompts: calibration prompts; no images are needed.
        state: where to go on; None: at the beginning.
        on_step: called before every denoiser call; raise in it to stop. The step is then lost, not
            the run.
        on_plan: told what is kept in memory and what computed again, whenever that changes.
        device_lock: held during each step, so that others can use the pipeline between them.

    Raises:
        BudgetError: the ratio is out of the model's range, or there are no prompts.
        CheckpointError: `state` belongs to another model.
        LearningError: the loss is not a number.
    """
    learner = _Learner(pipe, prompts, config, on_step, on_plan)
    state = state or LearnState.start(learner.variables)
    if any(v.shape != (learner.variables,) for v in state.vectors.values()):
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
