"""Calls of the dense denoiser on its own trajectories: what compensation learns from.

Recorded batch by batch; in a folder, they are there for the next process too.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import log
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from .errors import CheckpointError
from .plan import write_small
from .trajectory import call_options, denoiser_calls, prompt_rows


@dataclass(frozen=True)
class CompensateConfig:
    """How the statistics are gathered.

    Attributes:
        trajectories: dense trajectories, each from a prompt and a seed of its own.
        heldout: how many of them only check what the others gave.
        batch: trajectories at a time.
        calls: denoiser calls kept of each batch, evenly spread over the time steps.
        memory: bytes of statistics at a time; more passes over the calls are made if it does not
            suffice for all layers, down to one layer a pass.
        passes: in how many turns layers are updated in network order, each on the inputs that the
            pruned model then has; None: all from the dense model's.
        damping: e, as a fraction of the mean variance of a feature of x'.
        last_weight: weight of the last time step; the first has 1, between them it falls with the
            logarithm (OBS-Diff's timestep-aware weighting). 1 weighs all alike.
        inference_steps, guidance_scale, size: of the trajectories; None: the pipeline's default.
        extra: more arguments of the pipeline's call.
        seed: of prompts and latents.
    """

    trajectories: int = 40
    heldout: int = 8
    batch: int = 4
    calls: int = 6
    memory: int = 2 << 30
    passes: int | None = None
    damping: float = 0.05
    last_weight: float = 1.0
    inference_steps: int | None = None
    guidance_scale: float | None = None
    size: int | None = None
    extra: dict = field(default_factory=dict)
    seed: int = 0

    @property
    def batches(self) -> list[range]:
        """Numbers of the trajectories in each batch."""
        starts = range(0, self.trajectories, self.batch)
        return [range(first, min(first + self.batch, self.trajectories)) for first in starts]


@dataclass
class Call:
    """One recorded call of the dense denoiser."""

    args: tuple
    kwargs: dict
    heldout: bool
    weight: float


def record(
    pipe,
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


def missing(config: CompensateConfig, folder: Path) -> list[range]:
    """Batches that are not kept yet."""
    return [rows for rows in config.batches if not (folder / f"{rows.start}.safetensors").exists()]


def _spread(made: list[tuple[tuple, dict]], config: CompensateConfig, heldout: bool) -> list[Call]:
    """`config.calls` of a trajectory's calls, evenly spread over its time steps."""
    chosen = torch.linspace(0, len(made) - 1, min(config.calls, len(made))).round().long().unique()
    calls = []
    for index in chosen.tolist():
        fallen = (1 - config.last_weight) * log(1 + index) / log(max(2, len(made)))
        calls.append(Call(*made[index], heldout, 1 - fallen))
    return calls


def save(file: Path, calls: list[Call]) -> None:
    """Keep calls; or do not, if they hold what JSON cannot or the disk is full: they are only a cache."""
    leaves, spec = tree_flatten([(call.args, call.kwargs) for call in calls])
    tensors = {str(i): leaf.clone().contiguous() for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    rest = {str(i): leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    about = [(call.heldout, call.weight) for call in calls]
    with suppress(TypeError, NotImplementedError, CheckpointError):  # NotImplemented: a nest of another kind
        header = {"spec": treespec_dumps(spec), "rest": json.dumps(rest), "calls": json.dumps(about)}
        write_small(file, tensors, header)


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
        return [Call(*made, *facts) for made, facts in zip(given, about, strict=True)]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
