"""What remains takes over from what was removed: a closed-form update of the consumers' weights.

Dense consumers compute y = W x + b. Once units are gone the input is x', with fewer features. The
weights that reproduce y best from it, in the least squares sense over calibration data, pulled
towards the weights W_S that slicing left, are

    W' = W_S + (C - W_S A) (A + e I)^-1,    A = cov(x', x'),  C = cov(y, x'),
    b' = mean(y) - W' mean(x').

With x' = x_S, e = 0 and no bias this is W S[:, S] (S[S, S])^-1 of Optimal Brain Surgeon for whole
columns, as in OBS-Diff (arXiv 2510.06751) and SlimGPT. No gradients, no images.

x' are the features that stay, as the dense model has them; or, in network order, those of the
pruned model itself, so that later layers see what became of earlier ones. The former is the
default: on emoji-sdxl it is better (benchmarks), and one pass over the data serves every layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import BudgetError
from .groups import PRESET_KINDS, denoiser_of, find_groups
from .recording import Call, CompensateConfig, record
from .slicing import kept_features, plan_of
from .trajectory import EnoughError, moved


@dataclass
class Statistics:
    """Sums over calibration rows of one consumer: y is (rows, out), x is (rows, kept)."""

    rows: float = 0.0
    xx: Tensor | float = 0.0
    yx: Tensor | float = 0.0
    x: Tensor | float = 0.0
    y: Tensor | float = 0.0

    def add(self, y: Tensor, x: Tensor, weight: float = 1.0) -> None:
        if x.shape[1] == 0:
            x = x.new_zeros(len(y), 0)  # a layer that was emptied runs on one row
        self.rows += weight * len(x)
        self.xx = self.xx + weight * (x.T @ x)
        self.yx = self.yx + weight * (y.T @ x)
        self.x = self.x + weight * x.sum(0)
        self.y = self.y + weight * y.sum(0)

    def of(self, features: Tensor) -> "Statistics":
        """Those of some of the features of x, (features,) bool."""
        if not self.rows:
            return self
        xx = self.xx[features][:, features]
        return Statistics(self.rows, xx, self.yx[:, features], self.x[features], self.y)

    def covariances(self, centred: bool) -> tuple[Tensor, Tensor]:
        xx, yx = self.xx / self.rows, self.yx / self.rows
        if centred:
            x, y = self.x / self.rows, self.y / self.rows
            xx, yx = xx - torch.outer(x, x), yx - torch.outer(y, x)
        return xx, yx

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """Mean of ||W x + b - y||^2, less what does not depend on W and b."""
        xx, yx = self.covariances(centred=False)
        total = (weight @ xx * weight).sum() - 2 * (weight * yx).sum()
        if bias is not None:
            x, y = self.x / self.rows, self.y / self.rows
            total += 2 * bias @ (weight @ x - y) + bias @ bias
        return float(total)


def solve(statistics: Statistics, weight: Tensor, bias: Tensor | None, damping: float):
    """The equation above: updated weight (out, kept) and bias (out,) or None."""
    a, c = statistics.covariances(centred=bias is not None)
    damp = damping * a.diagonal().mean().clamp_min(1e-12)
    a = a + damp * torch.eye(len(a), dtype=a.dtype, device=a.device)
    weight = weight + torch.linalg.solve(a, (c + damp * weight - weight @ a).T).T
    if bias is not None:
        bias = (statistics.y - weight @ statistics.x) / statistics.rows
    return weight, bias


def _rows(module: nn.Module, tensor: Tensor, outputs: bool) -> Tensor:
    """What goes into or out of a Linear or a convolution, as float32 (rows, features)."""
    if isinstance(module, nn.Conv2d):
        if outputs:
            tensor = tensor.flatten(2)
        else:
            shape = (module.kernel_size, module.dilation, module.padding, module.stride)
            tensor = nn.functional.unfold(tensor.float(), *shape)
        tensor = tensor.transpose(1, 2)
    return tensor.float().flatten(0, -2)


def seen(denoiser: nn.Module, call: Call, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs of some layers during one call, as rows; stops once all have run."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name, module, inputs, output):
        found[name] = (_rows(module, inputs[0], False), _rows(module, output, True))
        if len(found) == len(names):
            raise EnoughError

    handles = [denoiser.get_submodule(n).register_forward_hook(partial(see, n)) for n in names]
    args, kwargs = moved((call.args, call.kwargs), denoiser.device)
    try:
        denoiser(*args, **kwargs)
    except EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


class Calibration:
    """Denoiser calls of dense trajectories, and the statistics of the dense model's consumers.

    Statistics are of all features: those of any plan are rows and columns of them. So what was
    gathered once serves every size, and is kept as long as it fits in `config.memory`. Calls are kept
    in `folder`, if there is one.
    """

    def __init__(self, pipe, prompts: Sequence[str], config: CompensateConfig, folder: Path | None = None):
        if not prompts or not 0 < config.heldout < config.trajectories:
            raise BudgetError("Compensation needs prompts, and more trajectories than it holds out.")
        self.config, self.dense = config, denoiser_of(pipe)
        self.calls = [call for batch in record(pipe, prompts, config, folder) for call in batch]
        self._kept: dict[str, tuple[Statistics, Statistics]] = {}

    def prepare(self) -> None:
        """Gather those of all layers that a preset can cut, if they can all be kept: then no size waits."""
        modules = dict(self.dense.named_modules())
        slots = [slot for group in find_groups(self.dense, PRESET_KINDS) for slot in group.consumers]
        names = [slot.module for slot in slots if isinstance(modules[slot.module], (nn.Linear, nn.Conv2d))]
        if self._bytes(names := list(dict.fromkeys(names))) <= self.config.memory:
            for _ in self.statistics(names):
                pass

    def statistics(self, names: list[str]) -> Iterator[tuple[str, Statistics, Statistics]]:
        """(name, to learn from, to check by) of consumers of the dense model."""
        for turn in self._turns([name for name in names if name not in self._kept]):
            gathered = self.gather(turn)
            if self._bytes([*self._kept, *turn]) <= self.config.memory:
                self._kept |= gathered
            else:
                yield from ((name, *gathered.pop(name)) for name in turn)
        yield from ((name, *self._kept[name]) for name in names if name in self._kept)

    @torch.no_grad()
    def gather(self, names: list[str], pruned: nn.Module | None = None):
        """One pass over the calls: {name: (to learn from, to check by)}.

        Args:
            pruned: where inputs are read; None: in the dense model, like the outputs.
        """
        gathered = {name: (Statistics(), Statistics()) for name in names}
        for call in self.calls:
            dense = seen(self.dense, call, names)
            inputs = dense if pruned is None else seen(pruned, call, names)
            for name in dense.keys() & inputs.keys():  # an expert may get no token, a branch not be asked
                gathered[name][call.heldout].add(dense[name][1], inputs[name][0], call.weight)
        return gathered

    def _turns(self, names: list[str]) -> list[list[str]]:
        """Consumers in network order, cut into turns whose statistics fit in memory."""
        turns: list[list[str]] = []
        for name in names:
            if not turns or self._bytes([*turns[-1], name]) > self.config.memory:
                turns.append([])
            turns[-1].append(name)
        return turns

    def _bytes(self, names: list[str]) -> int:
        total = 0
        for name in names:
            weight = self.dense.get_submodule(name).weight
            features = weight[0].numel()
            total += 2 * 4 * features * (features + len(weight))
        return total


@torch.no_grad()
def compensate_(
    small,
    pipe,
    prompts: Sequence[str] = (),
    config: CompensateConfig | None = None,
    calibration: Calibration | None = None,
) -> dict[str, bool]:
    """Update the weights that slicing left, in place, so that each layer gives what it gave before.

    Args:
        small: a variant of `pipe`, or a pruned pipeline that was loaded; only layers that were cut
            are changed, and they get new parameters: what is shared with `pipe` is not touched.
        pipe: the dense pipeline.
        prompts: calibration prompts; those of `config.heldout` trajectories only check.
        calibration: what was gathered before, instead of prompts and config.

    Returns:
        {consumer: updated}. A layer that would be worse on the held-out trajectories keeps its
        weights.

    Raises:
        BudgetError: no trajectories are left to learn from, or there are no prompts.

    Example:
        >>> small = ecodiff.variant(pipe, scores.plan(ratio=0.3))
        >>> ecodiff.compensate_(small, pipe, prompts)
    """
    calibration = calibration or Calibration(pipe, prompts, config or CompensateConfig())
    dense, pruned = denoiser_of(pipe), denoiser_of(small)
    kept = _kept_features(dense, plan_of(pruned) or {})
    config, updated = calibration.config, {}
    if config.passes is None:
        for name, learned, check in calibration.statistics(list(kept)):
            parts = (learned.of(kept[name]), check.of(kept[name]))
            updated[name] = _update(pruned.get_submodule(name), *parts, config.damping)
        return updated
    names, size = list(kept), -(-len(kept) // config.passes)
    for first in range(0, len(names), size):
        for name, parts in calibration.gather(names[first : first + size], pruned).items():
            updated[name] = _update(pruned.get_submodule(name), *parts, config.damping)
    return updated


def _kept_features(dense: nn.Module, plan: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Input features that stay, of every consumer that loses some, in network order."""
    kept = {name: rows for (name, axis), rows in kept_features(dense, plan).items() if axis == "in"}
    modules, found = dict(dense.named_modules()), {}
    for name, features in kept.items():  # packed experts and convolutions over time stay as they are
        if isinstance(modules[name], (nn.Linear, nn.Conv2d)) and not features.all():
            weight = modules[name].weight
            # A convolution reads each channel at every place of its kernel.
            found[name] = features.repeat_interleave(weight[0, 0].numel()).to(weight.device)
    return found


def _update(module: nn.Module, learned: Statistics, check: Statistics, damping: float) -> bool:
    """Solve for one layer; True if that is better on the held-out rows, and done."""
    if not learned.rows or not check.rows:
        return False
    weight = module.weight.float().flatten(1)
    bias = None if module.bias is None else module.bias.float()
    found = solve(learned, weight, bias, damping)
    if not check.error(*found) < check.error(weight, bias):
        return False
    module.weight = nn.Parameter(found[0].view_as(module.weight).to(module.weight.dtype), False)
    if bias is not None:
        module.bias = nn.Parameter(found[1].to(module.bias.dtype), False)
    return True
