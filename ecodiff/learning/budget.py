"""The budget of a run: what every unit costs, and what all of them together may keep."""

from collections.abc import Mapping, Sequence
from math import log

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..architectures import unit_parameters
from ..config import LearnConfig
from ..errors import BudgetError
from ..metrics.cost import parameters, unit_macs, unit_milliseconds
from ..pipelines import denoiser_of
from ..pruning import gates
from ..pruning.plan import PrunePlan
from ..pruning.scores import Scores
from ..units import PruneGroup, in_words

OPEN = 6.0  # log-alpha at which a gate is as good as open; closed at minus that


class Budget:
    """Costs of units as shares of the denoiser's, and the share that they may keep.

    Args:
        call: the pipeline's arguments for one batch; MACs and milliseconds are counted in it.

    Attributes:
        shares: float32 (units,): of the denoiser's cost, each unit's.
        keep: the share that units may keep: what they hold, less the ratio.
        macs: what `unit_macs` found, if the budget counts them.

    Raises:
        BudgetError: the ratio is beyond what the units hold.
    """

    def __init__(
        self, pipe: DiffusionPipeline, config: LearnConfig, groups: Sequence[PruneGroup], call: dict
    ):
        denoiser = denoiser_of(pipe)
        self.config, self.groups = config, list(groups)
        self.names = [group.name for group in groups]
        self.sizes = [group.size for group in groups]
        self.params = {g.name: unit_parameters(denoiser, g) for g in groups}
        self.macs = unit_macs(pipe, call, groups) if config.cost == "macs" else None
        self.costs: Mapping[str, float]
        total: float
        self.costs, total = self.macs or (self.params, parameters(denoiser))
        if config.cost == "ms":
            self.costs, total = unit_milliseconds(pipe, call, groups)
        self.total = total
        shares = torch.tensor([self.costs[name] for name in self.names], dtype=torch.float32) / total
        self.shares = shares.repeat_interleave(torch.tensor(self.sizes))
        inside = torch.tensor([group.inside in self.names for group in groups])  # they go with their heads
        ceiling = float(self.shares[~inside.repeat_interleave(torch.tensor(self.sizes))].sum())
        self.keep = ceiling - config.ratio
        if not 0 < config.ratio < ceiling:
            raise BudgetError(
                f"This model can give up between 0 and {ceiling:.1%} of its {config.cost} (the rest "
                f"is not in {in_words(config.kinds)}); {config.ratio:.1%} was asked for."
            )

    def plan(self, scores: Scores) -> PrunePlan:
        """The plan of the asked size, in whatever the budget counts."""
        return scores.plan(ratio=self.config.ratio, costs=(self.costs, self.total))

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all units (units,), by group."""
        return dict(zip(self.names, values.split(self.sizes), strict=True))

    def expected(self, log_alpha: Tensor) -> Tensor:
        """Expected share of the denoiser's cost in units that stay."""
        return (self.shares * gates.open_probability(log_alpha)).sum()

    def worth(self, saliency: Tensor) -> Tensor:
        """Saliency per share of the cost."""
        return saliency / self.shares.clamp_min(1e-12)

    def prior(self, worth: Tensor) -> tuple[Tensor, float]:
        """Log of each unit's worth in units of the budget's price, and the price.

        A unit is worth keeping if removing it costs more, per parameter, than the price, which is
        what the first unit that stays is worth.
        """
        ranked, order = worth.sort(stable=True)
        gone = self.shares[order].cumsum(0) < self.config.ratio
        price = float(ranked[int(gone.sum())].clamp_min(1e-20))
        return worth.clamp_min(1e-20).log() - log(price), price

    def start(self, prior: Tensor) -> Tensor:
        """Log-alphas from the prior, shifted so that the expected size is the budget."""
        start = prior.clamp(-OPEN, OPEN)
        low, high = -12.0, 12.0
        for _ in range(40):
            shift = (low + high) / 2
            over = self.expected(start + shift) > self.keep
            low, high = (low, shift) if over else (shift, high)
        return start + shift

    def per_parameter(self, worth: Tensor) -> Tensor:
        """Worth per cost as worth per parameter, which is what `Scores` hold."""
        if self.costs is self.params:
            return worth
        per_unit = torch.tensor([self.costs[n] / self.params[n] for n in self.names])
        return worth * per_unit.repeat_interleave(torch.tensor(self.sizes))
