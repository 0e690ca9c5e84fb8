"""Ways to rank units: `@method` registers one, and the command line, the page and the benchmark offer it.

Every method gives {group name: float32 (group.size,)}, higher is more important, comparable across
groups; `Scores.of(denoiser, values)` makes a ranking of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..architectures import find_groups
from ..config import PRESETS
from ..errors import BudgetError
from ..pipelines import denoiser_calls, denoiser_of, moved, stream
from ..pruning.masking import masked
from ..units import ALL_KINDS, PRESET_KINDS, PruneGroup
from . import choose
from .progress import Progress
from .streaming import is_rounded
from .trajectory import trajectory


class Values(dict[str, Tensor]):
    """{group: float32 (units,)}.

    Attributes:
        bases: of groups of directions (Z, Y), if the method finds directions.
        others: what other methods give by the same statistics, by name. Learning measures all and keeps one.
    """

    bases: Mapping[str, tuple[Tensor, Tensor]] = MappingProxyType({})
    others: "Mapping[str, Values]" = MappingProxyType({})


@dataclass(frozen=True)
class Method:
    """One way to rank units.

    Attributes:
        name: as in options and the API.
        source: where it was published.
        cost: dense trajectories that it takes for each one that it is given.
        score: (pipe, calls, seed) to {group name: (units,)}; calls are arguments of the pipeline, one
            dict a batch of trajectories.
        kinds: of units that it ranks, by default.
        wide: it is also given all calibration prompts, as `prompts`, `on_step`, `kinds`, and `kept`, where
            it keeps what it has done.
        passes: denoiser calls of each time step of a batch: differentiated and computed again.
        orders: how many it gives; of several, learning measures each.
    """

    name: str
    source: str
    cost: float
    score: Callable[..., dict[str, Tensor]]
    kinds: tuple[str, ...] = PRESET_KINDS
    wide: bool = False
    passes: float = 2
    orders: int = 1

    def expected_calls(self, steps: int, batches: int) -> float:
        """Denoiser calls of a `wide` method, about, in trajectories of so many steps."""
        measured = choose.BATCHES * (1 + self.orders) if self.orders > 1 else 0
        return steps * (self.passes * batches + measured)

    def __call__(
        self,
        pipe: DiffusionPipeline,
        calls: Sequence[dict],
        seed: int,
        prompts: Sequence[str],
        on_step: Callable[[], None] | None = None,
        kinds: Sequence[str] = (),
        kept: Progress | None = None,
    ) -> Values:
        """The scores of all units.

        Args:
            kinds: of a method that is `wide`, the units to rank; none: its own.
            on_step: called before every denoiser call of a method that is `wide`; raise in it to stop.
            kept: where a method that is `wide` keeps what it has done.
        """
        if not self.wide and is_rounded(denoiser_of(pipe)):
            raise BudgetError(
                f"{self.name} reads the weights themselves, which were rounded here. Rank by it on the full "
                "ones (without --learn-in)."
            )
        wide = {"prompts": prompts, "on_step": on_step, "kinds": kinds or self.kinds, "kept": kept}
        more = wide if self.wide else {}
        found = self.score(pipe, calls, seed, **more)
        return found if isinstance(found, Values) else Values(found)


METHODS: dict[str, Method] = {}
BATCHES = 4  # of calibration trajectories that a method is given


def method(
    name: str,
    source: str,
    cost: float,
    wide: bool = False,
    kinds: tuple[str, ...] = PRESET_KINDS,
    batches: int = BATCHES,
    passes: float = 2,
    orders: int = 1,
) -> Callable:
    """Register a function (pipe, calls, seed) -> values as a scoring method, by default for `kinds`."""

    def register(score: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        METHODS[name] = Method(name, source, cost, score, kinds, wide, passes, orders)
        PRESETS[name] = {"method": name, "warm_steps": batches, "steps": 0, "kinds": kinds}
        return score

    return register


@method("random", "the floor that every method has to beat", cost=0)
def random(pipe: DiffusionPipeline, calls: Sequence[dict] = (), seed: int = 0) -> dict[str, Tensor]:
    """Uniform noise: the floor that every method has to beat."""
    generator = stream("random", seed)
    return {g.name: torch.rand(g.size, generator=generator) for g in _groups(pipe)}


@method("magnitude-l2", "Han et al. 2015, arXiv 1506.02626, L2", cost=0)
def magnitude(
    pipe: DiffusionPipeline, calls: Sequence[dict] = (), seed: int = 0, norm: int = 2
) -> dict[str, Tensor]:
    """L1 or L2 norm of all weights of a unit, relative to the mean of its layer."""
    denoiser, values = denoiser_of(pipe), {}
    for group in _groups(pipe):
        powers = torch.zeros(group.size)
        for slot in group.slots:
            weight = slot.weight(denoiser)
            if weight is None:  # a norm that has none
                continue
            weight = weight.detach().float().cpu().movedim(slot.dim, 0)
            powers += weight.reshape(len(weight), -1).abs().pow(norm).sum(1)[slot.index].sum(1)
        values[group.name] = _relative(powers.pow(1 / norm))
    return values


@method("magnitude-l1", "Li et al. 2017, arXiv 1608.08710", cost=0)
def magnitude_l1(pipe: DiffusionPipeline, calls: Sequence[dict] = (), seed: int = 0) -> dict[str, Tensor]:
    """L1 norm of all weights of a unit, relative to the mean of its layer."""
    return magnitude(pipe, norm=1)


@method("wanda", "Sun et al. 2023, arXiv 2306.11695", cost=1)
def wanda(pipe: DiffusionPipeline, calls: Iterable[dict], seed: int = 0) -> dict[str, Tensor]:
    """Weight times activation, after Wanda (Sun et al. 2023, arXiv 2306.11695), per unit.

    |W_ij| ||x_j|| summed over a unit's consumer columns, x gathered over whole trajectories,
    relative to the mean of its layer.

    Args:
        calls: arguments of the pipeline, one dict a trajectory.
    """
    denoiser = denoiser_of(pipe)
    groups = _groups(pipe)
    squares: dict[str, Tensor] = {}

    def record(name: str) -> Callable:
        def hook(module, inputs):
            features = 1 if isinstance(module, (nn.Conv2d, nn.Conv3d)) else -1
            x = inputs[0].detach().float().movedim(features, -1).flatten(0, -2).square().sum(0).cpu()
            squares[name] = squares.get(name, 0) + x

        return hook

    names = {slot.module for group in groups for slot in group.consumers if not slot.bare}
    handles = [denoiser.get_submodule(n).register_forward_pre_hook(record(n)) for n in names]
    try:
        with trajectory(pipe, checkpoint=False) as run, torch.no_grad():
            for call in calls:
                run(**call)
    finally:
        for handle in handles:
            handle.remove()
    values = {}
    for group in groups:
        unit = torch.zeros(group.size)
        for slot in group.consumers:
            weight = slot.weight(denoiser).detach().float().cpu().abs()
            # What packed experts read inside is not seen: of them it is the weights alone.
            size = torch.ones(1) if slot.bare else squares[slot.module].sqrt()
            if slot.axis == "out" and not slot.bare:  # a row that is scattered: all that it reads
                features = weight.flatten(1) @ size
            else:
                features = weight.movedim(slot.dim, 0).flatten(1).sum(1) * size
            unit += features[slot.index].sum(1)
        values[group.name] = _relative(unit)
    return values


@method("taylor", "Diff-Pruning, Fang et al. 2023, arXiv 2305.10924", cost=5)
def taylor(
    pipe: DiffusionPipeline, calls: Iterable[dict], seed: int = 0, threshold: float = 0.05
) -> dict[str, Tensor]:
    """Diff-Pruning (Fang et al. 2023, arXiv 2305.10924): |sum over time steps of w dL_t/dw|, a unit.

    L_t is the training loss at a time step; steps are taken from the last (the least noise) on, as
    long as L_t is at least `threshold` of the largest so far: those near pure noise say little.
    There are no images: the dense model's own z_0 are noised. Relative to the mean of the layer.

    Args:
        calls: arguments of the pipeline, one dict a batch of trajectories.
    """
    denoiser = denoiser_of(pipe)
    groups = _groups(pipe)
    gates = {g.name: torch.ones(g.size, device=denoiser.device, requires_grad=True) for g in groups}
    totals = {g.name: torch.zeros(g.size) for g in groups}
    for index, call in enumerate(calls):
        largest = 0.0
        for loss in denoising_losses(pipe, call, stream("noise", seed, index), gates):
            size = float(loss.detach())
            largest = max(largest, size)
            if size < threshold * largest:
                break
            found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
            for name, gradient in zip(gates, found, strict=True):
                if gradient is not None:
                    totals[name] += gradient.float().cpu()
    return {name: _relative(total.abs()) for name, total in totals.items()}


def denoising_losses(
    pipe: DiffusionPipeline,
    call: dict,
    generator: torch.Generator,
    masks: Mapping[str, Tensor] | None = None,
    trained: Sequence[nn.Parameter] = (),
) -> Iterator[Tensor]:
    """The training loss at each time step of a call, the least noise first, on the dense model's own images.

    Args:
        generator: of the noise.
        masks, trained: gates and weights that gradients flow to.
    """
    denoiser = denoiser_of(pipe)
    with trajectory(pipe, checkpoint=False) as run, torch.no_grad():
        z0 = run(**call)
    noise = torch.randn(z0.shape, generator=generator).to(z0)
    steps = denoiser_calls(pipe, call)
    for (args, kwargs), time in reversed(list(zip(steps, pipe.scheduler.timesteps, strict=True))):
        noisy, target = _noised(pipe.scheduler, z0, noise, time)
        args, kwargs = moved((args, kwargs), denoiser.device)
        args, kwargs = _with_sample(args, kwargs, noisy)
        with masked(denoiser, masks or {}), trajectory(pipe, checkpoint=False, trained=trained):
            output = denoiser(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output.sample
            yield (output.float() - _repeated(target, len(output))).square().mean()


def _noised(scheduler, z0: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """The denoiser's input at a time step, made of z_0 and noise, and what it should answer."""
    if hasattr(scheduler, "sigmas"):
        sigma = scheduler.sigmas[scheduler.index_for_timestep(time)].to(z0)
        if not hasattr(scheduler, "scale_model_input"):  # flow matching: a straight line, its velocity
            return (1 - sigma) * z0 + sigma * noise, noise - z0
        signal = 1 / (1 + sigma**2).sqrt()
        spread = sigma * signal
    else:
        kept = scheduler.alphas_cumprod[int(time)].to(z0)
        signal, spread = kept.sqrt(), (1 - kept).sqrt()
    noisy = signal * z0 + spread * noise
    if scheduler.config.prediction_type == "epsilon":
        return noisy, noise
    return noisy, signal * noise - spread * z0


def _with_sample(args: tuple, kwargs: dict, noisy: Tensor) -> tuple[tuple, dict]:
    """A recorded call on other latents, repeated for guidance as the recorded ones were."""
    if args:
        return (_repeated(noisy, len(args[0])), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": _repeated(noisy, len(kwargs["hidden_states"]))}


def _repeated(batch: Tensor, rows: int) -> Tensor:
    """The batch over and over until it has `rows` rows: guidance stacks it once more."""
    return batch.repeat(rows // len(batch), *[1] * (batch.ndim - 1))


def _groups(pipe: DiffusionPipeline) -> list[PruneGroup]:
    """The groups of every kind: whatever a run may cut has a score."""
    return find_groups(denoiser_of(pipe), ALL_KINDS)


def _relative(values: Tensor) -> Tensor:
    return values / values.mean().clamp_min(torch.finfo(values.dtype).tiny)
