"""What learning adds to an order that counts the repair: gates learned on, from where `surgeon` ends.

    python benchmarks/learned_order.py [--model emoji-flux] [--rates 0.02 0.1] [--steps 8 32]

All of surgeon's units get a gate, directions in the bases that it found. Two ways, both end to end over whole
trajectories, by the objective of mask learning, steered to the size that is asked for:

gates: hard-concrete gates as EcoDiff learns them, with noise, started from surgeon's prices;
hard:  learning under the hard constraint (GRASPrune, arXiv 2604.19398): every step is made with what a plan
       of that size keeps, whole or not at all, and gradients go straight through to the scores.

After so many steps the ranking is cut, repaired and measured as in fidelity.py. Models without directions of
queries and keys only (emoji-flux).
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from math import log

import torch
from fidelity import Recognition, arguments, draw, measure, opened, results_file
from torch import Tensor

import ecodiff
from ecodiff.architectures import find_groups
from ecodiff.learning.budget import OPEN
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.checkpointing import gradients
from ecodiff.learning.compensate import compensate_
from ecodiff.learning.objective import Objective
from ecodiff.learning.trajectory import trajectory
from ecodiff.metrics.cost import parameters
from ecodiff.pipelines import denoiser_of, stream
from ecodiff.pruning import gates
from ecodiff.pruning.heads import turned
from ecodiff.pruning.masking import masked
from ecodiff.pruning.scores import Scores
from ecodiff.units import ALL_KINDS


class Gates:
    """A gate on every unit of a ranking; on directions, in their bases."""

    def __init__(self, denoiser, scores: Scores):
        self.denoiser, self.scores = denoiser, scores
        self.groups = {g.name: g for g in find_groups(denoiser, ALL_KINDS) if g.name in scores.values}

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """Values of all units (units,), by group, in the order of the ranking."""
        names = list(self.scores.values)
        return dict(zip(names, values.split([len(self.scores.values[n]) for n in names]), strict=True))

    @contextmanager
    def on(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """The denoiser with its units multiplied by their gates."""
        bases = self.scores.bases
        plain = {name: gate for name, gate in values.items() if name not in bases}
        with masked(self.denoiser, plain), ExitStack() as handles:
            for name in bases:
                group, (z, y) = self.groups[name], bases[name]
                if group.inside:  # Y diag(gate) Z of every head
                    heads = (z.unflatten(0, (-1, group.width)), y.T.unflatten(0, (-1, group.width)))
                    kept = values[name].view(-1, 1, group.width)
                    within = ((heads[1].mT * kept) @ heads[0]).flatten(0, 1)
                    hooks = [(s.module, partial(_turn, s.index, within)) for s in group.consumers]
                else:
                    across = partial(_project, z, y, values[name])
                    hooks = [(module, across) for module in {slot.module for slot in group.consumers}]
                for module, hook in hooks:
                    layer = self.denoiser.get_submodule(module)
                    handles.callback(layer.register_forward_pre_hook(hook).remove)
            yield

    def size(self, kept: Mapping[str, Tensor]) -> Tensor:
        """The share of the denoiser's parameters in units that stay, if each stays with that probability."""
        scores, total = self.scores, torch.zeros(())
        for name, part in kept.items():
            cost = scores.costs[name]
            if heads := scores.inside.get(name):
                part = part - 1  # of what its head holds, which counts as there
                part = part * kept[heads].repeat_interleave(len(part) // len(kept[heads]))
            total = total + cost * part.sum()
        return total / scores.total


def _turn(index: Tensor, within: Tensor, module, inputs: tuple) -> tuple:
    x = inputs[0]
    return (turned(x.flatten(0, -2).T, index, within).T.view(x.shape), *inputs[1:])


def _project(z: Tensor, y: Tensor, gate: Tensor, module, inputs: tuple) -> tuple:
    return ((inputs[0] @ z.T * gate) @ y.T, *inputs[1:])


def start(every: Gates, ratio: float) -> tuple[Tensor, float, float]:
    """Log of prices over that of the first unit that stays, that price in loss a share, and the budget."""
    scores = every.scores
    plan = scores.plan(ratio=ratio)
    worth = torch.cat(list(scores.values.values()))
    stays = torch.cat([plan[name] for name in scores.values])
    price = float(worth[~stays].quantile(0.95).clamp_min(1e-20))  # blocks, so not all that go are cheaper
    keep = float(every.size({name: part.float() for name, part in plan.items()}))
    return (worth.clamp_min(1e-20).log() - log(price)).clamp(-OPEN, OPEN), price * scores.total, keep


def shifted(every: Gates, prior: Tensor, keep: float) -> Tensor:
    """The prior, so that the expected size is the budget."""
    low, high = -12.0, 12.0
    for _ in range(40):
        middle = (low + high) / 2
        expected = every.size(every.by_group(gates.open_probability(prior + middle)))
        low, high = (low, middle) if expected > keep else (middle, high)
    return prior + low


def learned(
    pipe, objective: Objective, scores: Scores, ratio: float, hard: bool, rate: float, steps: int
) -> Iterator[tuple[int, float, Scores]]:
    """(steps done, loss, the ranking so far), after every step."""
    every = Gates(denoiser_of(pipe), scores)
    prior, multiplier, keep = start(every, ratio)
    value = (prior if hard else shifted(every, prior, keep)).clone().requires_grad_()
    adam = torch.optim.Adam([value], rate, betas=(0.9, 0.99))

    def ranking() -> Scores:
        return replace(scores, values=every.by_group(value.detach().exp()))

    for step in range(steps):
        batch = objective.batch_of(step)
        objective.target(batch)
        if hard:
            plan = ranking().plan(ratio=ratio)
            stays = torch.cat([plan[name].float() for name in scores.values])
            soft = torch.sigmoid(value)
            gate, price = stays + soft - soft.detach(), torch.zeros(())
        else:
            noise = torch.rand(value.shape, generator=stream("gates", objective.config.seed, step))
            gate = gates.sample(value, noise)
            size = every.size(every.by_group(gates.open_probability(value)))
            price = multiplier * size
            multiplier *= max(0.8, min(1.25, 1 + 10 * (float(size.detach()) - keep)))
        with every.on(every.by_group(gate)), trajectory(pipe, False, objective.count) as run:
            loss, z0 = objective.error(run, batch)
            (value.grad,) = gradients(loss + price, z0, [value])
        adam.step()
        yield step + 1, float(loss.detach()), ranking()


def main() -> None:
    parser = arguments(__doc__, [0.4], 64)
    parser.set_defaults(model="emoji-flux")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02, 0.1])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32])
    options = parser.parse_args()
    out = results_file("learned_order", options)
    model, pipe = opened(options)
    prompts, judged = model.prompts("calibration"), model.prompts("heldout")[: options.pairs]
    dense, recognised = draw(pipe, model, judged), Recognition(judged)
    calibration = Calibration(pipe, prompts, model.compensation())
    found = {"model": options.model, "pairs": len(judged), "rows": []}

    def judge(scores: Scores, ratio: float, **facts) -> None:
        for repaired in (False, True):
            small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
            if repaired:
                compensate_(small, pipe, calibration=calibration)
            row = facts | {"ratio": ratio, "repaired": repaired}
            row["removed"] = 1 - parameters(denoiser_of(small)) / parameters(denoiser_of(pipe))
            found["rows"].append(row | measure(dense, draw(small, model, judged), recognised))
            error, median = (found["rows"][-1][n][0] for n in ("latent_error", "latent_error_median"))
            print(row, f"{error:.4f} ({median:.4f})", flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")

    for ratio in options.ratios:
        config = model.learn_config("surgeon", ratio)
        objective, scores = Objective(pipe, prompts, config), ecodiff.learn_masks(pipe, prompts, config)
        judge(scores, ratio, way="surgeon", steps=0)
        for hard in (False, True):
            for rate in options.rates:
                facts = {"way": "hard" if hard else "gates", "rate": rate}
                run = learned(pipe, objective, scores, ratio, hard, rate, max(options.steps))
                for step, loss, ranking in run:
                    if step in options.steps:
                        judge(ranking, ratio, steps=step, loss=loss, **facts)


if __name__ == "__main__":
    main()
