"""The objective of mask learning: how far the final latents are from the dense model's, over trajectories."""

from collections.abc import Callable, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..checks import check_class, check_options
from ..config import LearnConfig
from ..errors import BudgetError, EcodiffError, exhausted
from ..pipelines import call_options, denoiser_calls, prompt_rows, stream
from . import distributed
from .trajectory import trajectory


class Objective:
    """||z_0(mask) - z_0(dense)||^2 over the dense latents' variance, on a run's batches of trajectories.

    Args:
        on_step: called before every denoiser call; raise in it to stop.

    Attributes:
        calls: denoiser calls of one trajectory; 0: not known yet.

    Raises:
        BudgetError: there are no prompts.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        config: LearnConfig,
        on_step: Callable[[], None] | None = None,
    ):
        if not prompts:
            raise BudgetError("Learning needs at least one prompt.")
        check_class(type(pipe))
        check_options(config.extra)
        self.pipe, self.config, self.on_step = pipe, config, on_step
        order = torch.randperm(len(prompts), generator=stream("order", config.seed)).tolist()
        self.prompts = [prompts[index] for index in order]
        self.calls = self._counted = 0
        self._targets: dict[int, tuple[Tensor, Tensor]] = {}
        self._try()

    def _try(self) -> None:
        """Begin one trajectory: what the pipeline refuses is told before anything is learned."""
        try:
            denoiser_calls(self.pipe, self.call(0), limit=0)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            if isinstance(error, EcodiffError) or exhausted(error):
                raise
            raise BudgetError(f"{type(self.pipe).__name__} cannot run with these settings: {error}") from None

    def batch_of(self, step: int) -> int:
        """Which of the run's batches of (prompt, seed) pairs a step draws from."""
        return step % max(1, self.config.trajectories // self.config.batch)

    def call(self, batch: int) -> dict:
        """The pipeline's arguments for a batch; of several processes, for this one's rows of it."""
        config = self.config
        options = call_options(
            self.pipe, config.inference_steps, config.guidance_scale, config.size, config.extra
        )
        rows = range(batch * config.batch, (batch + 1) * config.batch)[distributed.share(config.batch)]
        return prompt_rows(self.prompts, rows, config.seed, options)

    def target(self, batch: int) -> tuple[Tensor, Tensor]:
        """z_0 of the dense model for a batch, and the variance of all processes' share of it; found once."""
        if batch not in self._targets:
            before = self._counted
            with trajectory(self.pipe, False, self.count) as run, torch.no_grad():
                z0 = run(**self.call(batch)).float()
            self.calls = self._counted - before
            self._targets[batch] = z0, distributed.whole(z0).var()
        return self._targets[batch]

    def error(self, run: Callable[..., Tensor], batch: int) -> tuple[Tensor, Tensor]:
        """The objective on a batch, under the masks that are applied now, and the z_0 that it is of.

        Args:
            run: of an open `trajectory`.
        """
        target, variance = self.target(batch)
        z0 = run(**self.call(batch))
        return (z0.float() - target).square().mean() / variance, z0

    def count(self) -> None:
        """Before every denoiser call."""
        self._counted += 1
        if self.on_step is not None:
            self.on_step()

    @property
    def counted(self) -> int:
        """Denoiser calls so far, recomputed ones too."""
        return self._counted
