"""What each part of the method is worth, and how much learning is enough.

    python benchmarks/ablation.py            both tables, benchmarks/ablation.json, and the figure
    python benchmarks/ablation.py --figure   only draws the figure again

Parts are left out or changed one at a time, from a warm start of 12 batches. Then one run of 12 warm
and 48 learning steps is cut after every so many: error against the cost of learning. Latent error as in
fidelity.py; latents only, nothing is decoded.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fidelity import arguments, opened, results_file

import ecodiff
from ecodiff import catalog
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.compensate import compensate_
from ecodiff.learning.learn import learn
from ecodiff.metrics.fidelity import latent_error
from ecodiff.pipelines import call_options, denoiser_of, prompt_rows

BATCH = 8
CUT_AT = (4, 8, 12, 16, 28, 44, 60)


class Judge:
    """Error of a variant against the dense model on held-out prompts, a seed each."""

    def __init__(self, pipe, model: catalog.Model, pairs: int, steps: int | None = None):
        self.prompts, self.seed = model.prompts("heldout")[:pairs], 1  # other noise than calibration's
        self.options = call_options(pipe, steps or model.steps, model.guidance_scale, model.size, model.extra)
        self.dense = self.draw(pipe)

    @torch.inference_mode()
    def draw(self, pipe) -> torch.Tensor:
        parts = [range(i, min(i + BATCH, len(self.prompts))) for i in range(0, len(self.prompts), BATCH)]
        calls = [prompt_rows(self.prompts, rows, self.seed, self.options) for rows in parts]
        return torch.cat([pipe(**call, output_type="latent").images.float() for call in calls]).clone()

    def __call__(self, small) -> float:
        pairs = zip(self.dense, self.draw(small), strict=True)
        return float(np.mean([latent_error(dense, pruned) for dense, pruned in pairs]))


def learning_curve(pipe, model, judge, calibration, ratios, learn_ratio) -> Iterator[dict]:
    """Error after so many steps of one run."""
    config = replace(model.learn_config("fast", learn_ratio), warm_steps=12, steps=48)
    for state, scores in learn(pipe, model.prompts("calibration"), config):
        if state.step not in CUT_AT:
            continue
        for ratio in ratios:
            small = ecodiff.variant(pipe, scores.plan(ratio=ratio))
            row = {"steps": state.step, "learned": max(0, state.step - config.warm_steps), "ratio": ratio}
            row["plain"] = judge(small)
            compensate_(small, pipe, calibration=calibration)
            yield (
                row
                | {"compensated": judge(small)}
                | {key: state.history[-1][key] for key in ("relaxed", "hardened") if key in state.history[-1]}
            )


@contextmanager
def detached(pipe) -> Iterator[None]:
    """Gradients stop between time steps: each sees what it does to z_0 directly, not to later steps."""
    cut = denoiser_of(pipe).register_forward_pre_hook(lambda _, args: (args[0].detach(), *args[1:]))
    try:
        yield
    finally:
        cut.remove()


def parts(pipe, model, pairs, judge, calibration, ratio) -> Iterator[dict]:
    """One thing changed at a time."""
    prompts = model.prompts("calibration")
    base = replace(model.learn_config("fast", ratio), warm_steps=12, steps=0)

    def scores(**changes) -> ecodiff.Scores:
        return ecodiff.learn_masks(pipe, prompts, replace(base, **changes))

    def row(name, scores, calibration=calibration, judge=judge, align=True) -> dict:
        small = ecodiff.variant(pipe, scores.plan(ratio=ratio, align=align))
        if calibration is not None:
            compensate_(small, pipe, calibration=calibration)
        return {"part": name, "ratio": ratio, "error": judge(small)}

    whole = scores()
    yield row("warm start of 12 batches, compensated", whole)
    yield row("without compensation", whole, None)
    for name, changes in (
        ("compensation damped by 0.01 instead of 0.05", {"damping": 0.01}),
        ("compensation from 12 trajectories instead of 32", {"trajectories": 20}),
    ):
        yield row(name, whole, Calibration(pipe, prompts, replace(model.compensation(), **changes)))
    yield row("widths not aligned", whole, align=False)
    yield row("heads and FFN only", scores(kinds=("heads", "ffn")))
    with detached(pipe):
        short_sighted = scores()
    yield row("gradient not through the trajectory", short_sighted)
    yield row("8 calibration trajectories instead of 48", scores(trajectories=8))
    yield row("other calibration noise and order", scores(seed=1))
    for steps in (6, 20):
        yield row(
            f"learned on {steps} time steps instead of {base.inference_steps}", scores(inference_steps=steps)
        )
    yield row("judged on 50 time steps", whole, judge=Judge(pipe, model, pairs, steps=50))


def figure(found: dict, path: Path) -> None:
    """Error against steps of learning."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(figsize=(8, 4), dpi=150)
    for ratio in sorted({row["ratio"] for row in found["curve"]}):
        rows = [row for row in found["curve"] if row["ratio"] == ratio]
        for style, kind in (("o--", "plain"), ("o-", "compensated")):
            axes.plot(
                [r["steps"] for r in rows], [r[kind] for r in rows], style, label=f"{ratio:.0%}, {kind}"
            )
    warm = max(row["steps"] for row in found["curve"] if not row["learned"])
    axes.axvline(warm, color="grey", lw=0.8, ls=":", label="learning begins")
    axes.set(yscale="log", xlabel="steps of 4 trajectories", ylabel="latent error")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    drawing.tight_layout()
    drawing.savefig(path)


def main() -> None:
    options = arguments(__doc__, [0.2, 0.4], 24).parse_args()
    out = results_file("ablation", options)
    if options.figure:
        figure(json.loads(out.read_text()), out.with_suffix(".png"))
        return
    model, pipe = opened(options)
    judge = Judge(pipe, model, options.pairs)
    calibration = Calibration(pipe, model.prompts("calibration"), model.compensation())
    found = {"model": options.model, "pairs": options.pairs, "curve": [], "parts": []}
    common = (pipe, model, options.pairs, judge, calibration, options.ratios[-1])
    for row in parts(*common):
        found["parts"].append(row)
        print(f"{row['part']:<52}{row['ratio']:>6.0%}{row['error']:>10.5f}", flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{'steps':>5}{'of them learning':>18}{'removed':>9}{'plain':>10}{'compensated':>13}")
    for row in learning_curve(pipe, model, judge, calibration, options.ratios, options.learn_ratio):
        found["curve"].append(row)
        cells = f"{row['steps']:>5}{row['learned']:>18}{row['ratio']:>9.0%}"
        print(f"{cells}{row['plain']:>10.5f}{row['compensated']:>13.5f}", flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")
    figure(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
