"""Learning which units matter, end to end over whole trajectories (EcoDiff, arXiv 2412.02852).

The state is small (a log-alpha a unit, Adam's moments, a few counters) and every step draws from
generators seeded by its own number. So a run can be stopped, killed and resumed anywhere, and ends
with the same scores, bit for bit, as one that was left alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from math import inf, isfinite

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..architectures import find_groups
from ..checks import check_pipeline
from ..config import LearnConfig
from ..errors import BudgetError, CheckpointError, LearningError
from ..pipelines import denoiser_of, stream
from ..pruning import gates
from ..pruning.masking import masked
from ..pruning.plan import PARTS
from ..pruning.scores import Scores
from ..units import in_words
from . import distributed
from .budget import OPEN, Budget
from .checkpointing import Keep, gradients
from .choose import measured
from .gauss_newton import gauss_newton_sample
from .memory import Retry
from .methods import METHODS
from .objective import Objective
from .progress import Progress
from .scoring import Values
from .state import LearnState
from .streaming import is_rounded
from .trajectory import trajectory

ERROR_OF = "error of "  # in a row of the history, before the name of an order that was measured

# Of the official SDXL configuration: log-alpha at the start, temperature of the gates, and eps,
# which bounds their noise to |log((u + eps) / (1 - u + eps))| <= log((1 + eps) / eps).
PUBLISHED_START, PUBLISHED_TEMPERATURE, PUBLISHED_EPS = 3.0, 0.83, 0.5


def learn(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: LearnConfig,
    state: LearnState | None = None,
    *,
    on_step: Callable[[], None] | None = None,
    on_plan: Callable[[str], None] | None = None,
    device_lock: AbstractContextManager | None = None,
    kept: Progress | None = None,
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
        kept: of this run; where a method that ranks in one step keeps what it has done.

    Raises:
        BudgetError: the ratio is out of the model's range, or there are no prompts.
        CheckpointError: `state` belongs to another model.
        LearningError: the loss is not a number.
        Paused: a ranking in one step is not done, and the time of `kept` is up.
    """
    check_pipeline(pipe)
    objective = Objective(pipe, prompts, config, on_step)
    groups = find_groups(denoiser_of(pipe), config.kinds)
    budget = Budget(pipe, config, groups, objective.call(0))
    retry = Retry(pipe, groups, objective, config.checkpoint, on_plan)
    state = state or LearnState.start(sum(budget.sizes))
    if any(v.shape != budget.shares.shape for name, v in state.vectors.items() if "." not in name):
        raise CheckpointError("The saved state has another number of units than this model.")
    while state.step < config.total_steps:
        with device_lock or nullcontext():
            state = retry(partial(_advance, state, budget, objective, kept))
        yield state, scores(denoiser_of(pipe), budget, state)


def learn_masks(
    pipe: DiffusionPipeline,
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
    for state, found in learn(pipe, prompts, config or LearnConfig()):  # noqa: B007 - the last is returned
        if callback is not None:
            callback(state)
    return found


def _advance(
    state: LearnState, budget: Budget, objective: Objective, kept: Progress | None, keep: Keep
) -> LearnState:
    """The state one step on."""
    config = budget.config
    state = state.copy()
    if config.warm_steps == state.step == 0:
        state.vectors["log_alpha"].fill_(PUBLISHED_START)
    if config.method is not None:
        row = _score(state, budget, objective, kept)
    elif state.step < config.warm_steps:
        row = _warm_up(state, budget, objective, keep)
    else:
        row = _learn(state, budget, objective, keep)
    if not all(isfinite(v) for v in row.values()) or not all(
        v.isfinite().all() for v in state.vectors.values()
    ):
        if not objective.target(objective.batch_of(state.step))[0].isfinite().all():
            raise LearningError(
                "The dense model itself gives values that are not numbers with these prompts and settings. "
                "Try float32 or bfloat16 instead of float16, another guidance, or other prompts."
            )
        raise LearningError(
            f"Step {state.step + 1} gave values that are not numbers. The state before it is "
            "kept. Try float32 or bfloat16 instead of float16, or another seed."
        )
    state.step += 1
    state.history.append({"step": state.step, **row})
    if state.step == config.warm_steps and config.method is None:
        prior, state.multiplier = budget.prior(budget.worth(_saliency(state, config)))
        state.vectors["log_alpha"] = budget.start(prior)
    return state


def _score(state: LearnState, budget: Budget, objective: Objective, kept: Progress | None) -> dict:
    """All of another method's scores at once, as saliency."""
    config = budget.config
    if METHODS[str(config.method)].wide and distributed.count() > 1:
        raise BudgetError(f"{config.method} runs in one process: each would find directions of its own.")
    calls = [objective.call(batch) for batch in range(config.warm_steps)]
    found = METHODS[str(config.method)](
        objective.pipe, calls, config.seed, objective.prompts, objective.count, config.kinds, kept
    )
    if missing := [group for group in budget.groups if group.name not in found]:
        raise BudgetError(f"{config.method} does not rank {in_words([missing[0].kind])}. Choose other kinds.")
    orders = {str(config.method): found} | dict(found.others)
    errors: dict[str, float] = {}
    if found.others and not is_rounded(denoiser := denoiser_of(objective.pipe)):  # which can be cut
        plans = {name: budget.plan(_in_order(denoiser, budget, order)) for name, order in orders.items()}
        errors = measured(objective, plans, kept)
    found = orders[min(errors, key=errors.__getitem__)] if errors else found
    for name in set(budget.names) & set(found.bases):
        for part, matrix in zip(PARTS, found.bases[name], strict=True):
            state.vectors[f"{name}.{part}"] = matrix.flatten()
    values = torch.cat([found[name] for name in budget.names])
    state.vectors["saliency"] = distributed.mean(values)
    return {f"{ERROR_OF}{name}": error for name, error in errors.items()}


def _warm_up(state: LearnState, budget: Budget, objective: Objective, keep: Keep) -> dict:
    """One Gauss-Newton sample of every unit's importance."""
    config, before = budget.config, objective.counted
    squares = gauss_newton_sample(
        objective.pipe,
        find_groups(denoiser_of(objective.pipe), config.kinds),
        objective.call(objective.batch_of(state.step)),
        stream("probe", config.seed, state.step),
        checkpoint=keep,
        on_step=objective.count,
        rows=distributed.share(config.batch),
    )
    if keep.recomputed == inf:
        objective.calls = (objective.counted - before) // 2  # each was made twice
    state.vectors["saliency"] += distributed.mean(torch.cat([squares[name] for name in budget.names]))
    return {}


def _saliency(state: LearnState, config: LearnConfig) -> Tensor:
    """Mean of the samples so far."""
    return state.vectors["saliency"] / max(1, min(state.step, config.warm_steps))


def _learn(state: LearnState, budget: Budget, objective: Objective, keep: Keep) -> dict:
    """One Adam step on loss + multiplier * expected size, and one on the multiplier."""
    config, vectors = budget.config, state.vectors
    batch = objective.batch_of(state.step)
    log_alpha = vectors["log_alpha"].clone().requires_grad_()
    noise = torch.rand(log_alpha.shape, generator=stream("gates", config.seed, state.step))
    if config.penalty is None:
        gate = gates.sample(log_alpha, noise)
    else:
        noise = (noise + PUBLISHED_EPS) / (1 + 2 * PUBLISHED_EPS)
        gate = gates.sample(log_alpha, noise, PUBLISHED_TEMPERATURE)
    objective.target(batch)
    masks = masked(denoiser_of(objective.pipe), budget.by_group(gate))
    with trajectory(objective.pipe, keep, objective.count) as run, masks:
        loss, z0 = objective.error(run, batch)
        size = budget.expected(log_alpha)
        price = state.multiplier * size
        if config.penalty is not None:
            price = config.penalty * _published_penalty(log_alpha, budget)
        (found,) = gradients(loss + price, z0, [log_alpha])
    assert found is not None  # the size depends on every gate
    gradient, loss = distributed.mean(found), distributed.mean(loss.detach())
    _adam(vectors, gradient, config.rate, state.step - config.warm_steps + 1)
    # Dual ascent: the price rises while the expected size is above the budget.
    over = float(size.detach()) - budget.keep
    state.multiplier *= max(0.8, min(1.25, 1 + 10 * over))
    row = {"loss": float(loss), "expected": float(budget.shares.sum() - size.detach())}
    if state.step + 1 == config.total_steps:
        row |= _gap(vectors["log_alpha"], budget, objective, batch)
    return row


def _published_penalty(log_alpha: Tensor, budget: Budget) -> Tensor:
    """The paper's code: mean |log-alpha| of each layer, mean over layers, heads plus FFN."""
    kinds = {group.name: group.kind for group in budget.groups}
    means: dict[str, list[Tensor]] = {}
    for name, part in budget.by_group(log_alpha.abs()).items():
        means.setdefault(kinds[name], []).append(part.mean())
    return torch.stack([torch.stack(m).mean() for m in means.values()]).sum()


def _adam(vectors: dict[str, Tensor], gradient: Tensor, rate: float, updates: int) -> None:
    mean, square = vectors["mean"], vectors["square"]
    mean.lerp_(gradient, 0.1)
    square.lerp_(gradient.square(), 0.01)
    scale = (square / (1 - 0.99**updates)).sqrt() + 1e-12
    vectors["log_alpha"] -= rate * (mean / (1 - 0.9**updates)) / scale


def _gap(log_alpha: Tensor, budget: Budget, objective: Objective, batch: int) -> dict:
    """Loss with the gates' medians and with the plan that is cut from them, on one batch."""
    pipe, losses = objective.pipe, {}
    plan = budget.plan(_ranked(denoiser_of(pipe), budget, budget.per_parameter(log_alpha.exp())))
    relaxed = budget.by_group(gates.hard(log_alpha))
    hardened = {name: keep.float() for name, keep in plan.items()}
    for name, masks in (("relaxed", relaxed), ("hardened", hardened)):
        applied = masked(denoiser_of(pipe), masks)
        with trajectory(pipe, False, objective.count) as run, applied, torch.no_grad():
            losses[name] = float(distributed.mean(objective.error(run, batch)[0]))
    return losses


def scores(denoiser: torch.nn.Module, budget: Budget, state: LearnState) -> Scores:
    """The ranking so far. Log-alphas become worths: the exponential keeps their order."""
    config = budget.config
    if config.method is not None:
        values, steps = state.vectors["saliency"], state.step
        bases = _bases(state, dict(zip(budget.names, budget.sizes, strict=True)))
        errors = measured_orders(state)
        chosen = min(errors, key=errors.__getitem__) if errors else config.method
        facts = {"orders": errors} if errors else {}
        return _ranked(denoiser, budget, values, bases, method=chosen, steps=steps, **facts)
    worth = budget.worth(_saliency(state, config))
    if state.step <= config.warm_steps:
        values = budget.per_parameter(worth)
        return _ranked(denoiser, budget, values, method="gauss-newton", steps=state.step)
    log_alpha = state.vectors["log_alpha"]
    if config.warm_steps:  # what was beyond reach of learning still has its order
        prior, _ = budget.prior(worth)
        log_alpha = log_alpha + (prior - prior.clamp(-OPEN, OPEN))
    method = "learned" if config.penalty is None else "ecodiff, as published"
    values = budget.per_parameter(log_alpha.exp())
    return _ranked(denoiser, budget, values, method=method, steps=state.step)


def _in_order(denoiser: torch.nn.Module, budget: Budget, order: Values) -> Scores:
    """Scores by one method's values."""
    values = torch.cat([order[name] for name in budget.names])
    bases = {name: basis for name, basis in order.bases.items() if name in budget.names}
    return _ranked(denoiser, budget, values, bases)


def measured_orders(state: LearnState) -> dict[str, float]:
    """Latent errors of the orders that were compared, by method; empty if there was one only."""
    row = state.history[-1] if state.history else {}
    return {key.removeprefix(ERROR_OF): error for key, error in row.items() if key.startswith(ERROR_OF)}


def _bases(state: LearnState, sizes: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """(Z, Y) of groups of directions."""
    found = {}
    for name in {key.rpartition(".")[0] for key in state.vectors if "." in key}:
        z, y = (state.vectors[f"{name}.{part}"] for part in PARTS)
        found[name] = (z.view(sizes[name], -1), y.view(-1, sizes[name]))
    return found


def _ranked(
    denoiser: torch.nn.Module, budget: Budget, values: Tensor, bases: dict | None = None, **facts
) -> Scores:
    """Scores of what all units are worth, per parameter."""
    facts |= {"learn": asdict(budget.config)} | ({"weights": "float8"} if is_rounded(denoiser) else {})
    return Scores.of(denoiser, budget.by_group(values), budget.macs, bases, **facts)
