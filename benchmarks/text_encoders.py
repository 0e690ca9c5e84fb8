"""What smaller text encoders cost: error of the images, by the share of their parameters that is gone.

    python benchmarks/text_encoders.py

Both embedded models, the denoiser dense, held-out prompts. Ranked at random, by the norm of the weights, and
by ecodiff (the embeddings' Gauss-Newton metric, in an order that counts the repair); + is repaired, the same
for all. Errors are those of fidelity.py. Last, 20 % of the denoiser with dense and with pruned text encoders.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from fidelity import Recognition, draw, measure

import ecodiff
from ecodiff import catalog
from ecodiff.architectures import find_groups
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.encodings import text_encoders
from ecodiff.learning.methods import measured_best
from ecodiff.learning.text_encoders import rank_text_encoders
from ecodiff.pipelines import denoiser_of, stream
from ecodiff.pruning.plan import PrunePlan
from ecodiff.pruning.scores import Scores

RATIOS = (0.1, 0.2, 0.3, 0.4)


def norms(pipe, scores: Scores) -> Scores:
    """The same units by the L2 norm of their weights, relative to the mean of their layer, a parameter."""
    values = {}
    for name, encoder in text_encoders(pipe).items():
        for group in find_groups(encoder):
            if (whole := f"{name}.{group.name}") not in scores.values:
                continue
            squares = torch.zeros(group.size)
            for slot in group.slots:
                weight = slot.weight(encoder).detach().float().movedim(slot.dim, 0).flatten(1)
                squares += weight.square().sum(1)[slot.index].sum(1)
            values[whole] = squares.sqrt() / squares.sqrt().mean() / scores.costs[whole]
    return replace(scores, values=values)


def at_random(scores: Scores) -> Scores:
    """The same units in no order."""
    generator = stream("random", 0)
    return replace(
        scores, values={n: torch.rand(len(v), generator=generator) for n, v in scores.values.items()}
    )


def run(name: str, pairs: int) -> dict:
    """{"order at ratio": {measure: [mean, low, high]}} of one model."""
    model = catalog.find(name)
    pipe = ecodiff.load(name)
    pipe.set_progress_bar_config(disable=True)
    prompts, learned_on = model.prompts("heldout")[:pairs], model.prompts("calibration")
    recognised, dense = Recognition(prompts), draw(pipe, model, prompts)
    begun = time.perf_counter()
    scores = rank_text_encoders(pipe, learned_on, model.compensation())
    found: dict = {"seconds to rank": time.perf_counter() - begun, "parameters": scores.total}
    found["denoiser"] = sum(p.numel() for p in denoiser_of(pipe).parameters())
    calibration = Calibration(pipe, learned_on, model.compensation())
    orders = {"ecodiff": scores, "magnitude": norms(pipe, scores), "random": at_random(scores)}

    def note(what: str, plan: PrunePlan) -> None:
        small = ecodiff.variant(pipe, plan)
        for repaired in ("", "+"):
            if repaired:
                ecodiff.compensate_(small, pipe, calibration=calibration)
            found[what + repaired] = measure(dense, draw(small, model, prompts), recognised)
            print(
                name,
                what + repaired,
                {k: round(v[0], 5) for k, v in found[what + repaired].items()},
                flush=True,
            )

    for which, order in orders.items():
        for ratio in RATIOS:
            if ratio <= scores.ceiling:
                note(f"{which} {ratio:.0%}", PrunePlan(order.plan(ratio=ratio)))
    preset = measured_best(denoiser_of(pipe), "balanced")
    denoiser = ecodiff.learn_masks(pipe, learned_on, model.learn_config(preset, 0.2)).plan(ratio=0.2)
    note("denoiser 20%", denoiser)
    both = denoiser.joined(scores.plan(ratio=0.3))
    note("denoiser 20%, encoders 30%", both)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["emoji-sdxl", "emoji-flux"])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {name: run(name, options.pairs) for name in options.models}
    options.out.write_text(json.dumps(results, indent=1) + "\n")
