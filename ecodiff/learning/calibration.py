"""Calibration: recorded calls of the dense denoiser, and the statistics of its layers."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from ..architectures import find_groups
from ..config import CompensateConfig
from ..errors import BudgetError, CheckpointError
from ..machine import device_of, free_bytes, room
from ..pipelines import EnoughError, call_options, denoiser_calls, denoiser_of, moved, prompt_rows
from ..pruning.heads import turned
from ..storage import write_tensors
from ..units import PRESET_KINDS


@dataclass
class Call:
    """One recorded call of the dense denoiser."""

    args: tuple
    kwargs: dict
    heldout: bool


def record(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: CompensateConfig,
    folder: Path | None = None,
    on_step=None,
    batches: Sequence[range] | None = None,
) -> Iterator[list[Call]]:
    """Yields the calls of each batch, on the CPU.

    Args:
        folder: where batches are kept; those that are there are not drawn again.
        on_step: called before every denoiser call.
        batches: some of `config.batches`; None: all.
    """
    options = call_options(pipe, config.inference_steps, config.guidance_scale, config.size, config.extra)
    for rows in config.batches if batches is None else batches:
        file = folder and folder / f"{rows.start}.safetensors"
        calls = load(file) if file else None
        if calls is None:
            made = denoiser_calls(pipe, prompt_rows(prompts, rows, config.seed, options), on_step=on_step)
            calls = _spread(made, config, rows.start < config.heldout)
            if file:
                save(file, calls)
        yield calls


def fewer_passes(config: CompensateConfig, device: torch.device) -> CompensateConfig:
    """With half of what is free on a GPU for statistics, so that calls are gone over less often."""
    if device.type != "cuda":
        return config
    return replace(config, memory=max(config.memory, free_bytes(device) // 2))


def missing(config: CompensateConfig, folder: Path | None) -> list[range]:
    """Batches that are not kept yet; where nothing is kept, none."""
    if folder is None:
        return []
    return [rows for rows in config.batches if not (folder / f"{rows.start}.safetensors").exists()]


def _spread(made: list[tuple[tuple, dict]], config: CompensateConfig, heldout: bool) -> list[Call]:
    """`config.calls` of a trajectory's calls, evenly spread over its time steps."""
    chosen = torch.linspace(0, len(made) - 1, min(config.calls, len(made))).round().long().unique()
    return [Call(made[index][0], made[index][1], heldout) for index in chosen.tolist()]


def save(file: Path, calls: list[Call]) -> None:
    """Keep calls; or do not, if they hold what JSON cannot or the disk is full: they are only a cache."""
    leaves, spec = tree_flatten([(call.args, call.kwargs) for call in calls])
    tensors = {str(i): leaf.clone().contiguous() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    rest = {str(i): leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    about = [[call.heldout] for call in calls]
    with suppress(TypeError, NotImplementedError, CheckpointError):  # NotImplemented: a nest of another kind
        header = {"spec": treespec_dumps(spec), "rest": json.dumps(rest), "calls": json.dumps(about)}
        write_tensors(file, tensors, header)


def load(file: Path) -> list[Call] | None:
    """What `save` kept; None if there is nothing, or it is damaged."""
    try:
        with safe_open(file, "pt") as stored:
            header = stored.metadata()
            leaves = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        leaves |= json.loads(header["rest"])
        spec = treespec_loads(header["spec"])
        given = tree_unflatten([leaves[str(i)] for i in range(len(leaves))], spec)
        about = json.loads(header["calls"])
        return [
            Call(args, kwargs, bool(facts[0])) for (args, kwargs), facts in zip(given, about, strict=True)
        ]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


@dataclass
class Statistics:
    """Sums over calibration rows of one consumer: y is (rows, out), x is (rows, kept)."""

    rows: float = 0.0
    xx: Any = 0.0  # Tensors, once there is a row
    yx: Any = 0.0
    x: Any = 0.0
    y: Any = 0.0

    def add(self, y: Tensor, x: Tensor) -> None:
        if x.shape[1] == 0:
            x = x.new_zeros(len(y), 0)  # a layer that was emptied runs on one row
        self.rows += len(x)
        self.xx = self.xx + x.T @ x
        self.yx = self.yx + y.T @ x
        self.x = self.x + x.sum(0)
        self.y = self.y + y.sum(0)

    def of(self, features: Tensor) -> "Statistics":
        """Those of some of the features of x, (features,) bool."""
        if not self.rows:
            return self
        xx = self.xx[features][:, features]
        return Statistics(self.rows, xx, self.yx[:, features], self.x[features], self.y)

    def turned(self, index: Tensor, z: Tensor) -> "Statistics":
        """Those of Z x in place of the features `index`, (units, copies), of heads; z is (units, width)."""
        if not self.rows:
            return self
        xx = turned(turned(self.xx, index, z).T.contiguous(), index, z)
        yx, x = turned(self.yx.T, index, z).T, turned(self.x[:, None], index, z)[:, 0]
        return Statistics(self.rows, xx, yx, x, self.y)

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


def _rows(module: nn.Module, tensor: Tensor, outputs: bool) -> Tensor:
    """What goes into or out of a Linear or a convolution, as float32 (rows, features)."""
    if isinstance(module, nn.Conv2d):
        if outputs:
            tensor = tensor.flatten(2)
        else:
            shape: Any = (module.kernel_size, module.dilation, module.padding, module.stride)
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
    gathered once serves every size, and is kept as long as it fits in `config.memory`, or in half of what is
    free on the device. Calls are kept in `folder`, if there is one.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        config: CompensateConfig,
        folder: Path | None = None,
    ):
        if not prompts or not 0 < config.heldout < config.trajectories:
            raise BudgetError("Compensation needs prompts, and more trajectories than it holds out.")
        self.dense: nn.Module = denoiser_of(pipe)
        self.config, self.prompts = config, list(prompts)
        self.memory = room(denoiser_of(pipe).device, config.memory)
        self.calls = [call for batch in record(pipe, prompts, config, folder) for call in batch]
        self._kept: dict[str, tuple[Statistics, Statistics]] = {}
        self.text_encoders: dict[str, Calibration] = {}  # once one of them is repaired

    @classmethod
    def of_calls(cls, dense: nn.Module, calls: Sequence[Call], config: CompensateConfig) -> "Calibration":
        """That of any model whose calls were recorded."""
        made = cls.__new__(cls)
        made.config, made.dense, made.prompts, made.calls, made._kept = config, dense, [], list(calls), {}
        made.memory, made.text_encoders = room(device_of(dense), config.memory), {}
        return made

    def prepare(self) -> None:
        """Gather those of all layers that a preset can cut, if they can all be kept: then no size waits."""
        modules = dict(self.dense.named_modules())
        slots = [slot for group in find_groups(self.dense, PRESET_KINDS) for slot in group.consumers]
        names = [slot.module for slot in slots if isinstance(modules[slot.module], (nn.Linear, nn.Conv2d))]
        if self._bytes(names := list(dict.fromkeys(names))) <= self.memory:
            for _ in self.statistics(names):
                pass

    def statistics(self, names: list[str]) -> Iterator[tuple[str, Statistics, Statistics]]:
        """(name, to learn from, to check by) of consumers of the dense model."""
        for turn in self._turns([name for name in names if name not in self._kept]):
            gathered = self.gather(turn)
            if self._bytes([*self._kept, *turn]) <= self.memory:
                self._kept |= gathered
            else:
                yield from ((name, *gathered.pop(name)) for name in turn)
        yield from ((name, *self._kept[name]) for name in names if name in self._kept)

    @torch.no_grad()
    def gather(self, names: list[str]) -> dict[str, tuple[Statistics, Statistics]]:
        """One pass over the calls: {name: (to learn from, to check by)}."""
        gathered = {name: (Statistics(), Statistics()) for name in names}
        for call in self.calls:
            for name, (x, y) in seen(self.dense, call, names).items():  # an expert may get no token
                gathered[name][call.heldout].add(y, x)
        return gathered

    def _turns(self, names: list[str]) -> list[list[str]]:
        """Consumers in network order, cut into turns whose statistics fit in memory."""
        turns: list[list[str]] = []
        for name in names:
            if not turns or self._bytes([*turns[-1], name]) > self.memory:
                turns.append([])
            turns[-1].append(name)
        return turns

    def _bytes(self, names: list[str]) -> int:
        total = 0
        for name in names:
            layer: Any = self.dense.get_submodule(name)
            weight = layer.weight
            features = weight[0].numel()
            total += 2 * 4 * features * (features + len(weight))
        return total
