"""Which units to remove: learned masks against other scores, same model, same parameters removed.

    python benchmarks/fidelity.py                        prints a table, writes benchmarks/fidelity.json
    python benchmarks/fidelity.py --prompts 8 --seeds 1  a quick look

Every method ranks the same units once and is cut by the same `Scores.plan` at all sizes. Images are
drawn at the model's default settings from held-out prompts, the dense and every pruned model from
the same noise. Latent error is ||z0 - z0'||^2 over the variance of z0; 95 % confidence intervals by
bootstrap over prompts.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

import ecodiff
from ecodiff import catalog, saliency
from ecodiff.fidelity import Sample, fidelity
from ecodiff.learn import PRESETS

BATCH = 8
MEASURES = ("latent_error", "psnr", "ssim")


@torch.inference_mode()
def draw(pipe, model: catalog.Model, prompts: list[str], seeds: range) -> list[Sample]:
    """One sample a prompt and seed, prompt by prompt."""
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    samples = []
    for first in range(0, len(pairs), BATCH):
        part, last = pairs[first : first + BATCH], {}

        def keep(pipe, index, timestep, kwargs, last=last):
            last["z"] = kwargs["latents"]
            return kwargs

        images = pipe(
            [prompt for prompt, _ in part],
            num_inference_steps=model.steps,
            guidance_scale=model.guidance_scale,
            generator=[torch.Generator().manual_seed(10_000 + seed) for _, seed in part],
            callback_on_step_end=keep,
        ).images
        samples += [Sample(i, z.float().clone(), 0.0) for i, z in zip(images, last["z"], strict=True)]
    return samples


def calibration_calls(model: catalog.Model, trajectories: int) -> list[dict]:
    """Arguments of batches of calibration trajectories, as learning uses them."""
    prompts = model.prompts("calibration")
    return [
        {
            "prompt": [prompts[(first + i) % len(prompts)] for i in range(4)],
            "generator": [torch.Generator().manual_seed(first + i) for i in range(4)],
            "num_inference_steps": model.learn_steps,
            "guidance_scale": model.guidance_scale,
        }
        for first in range(0, trajectories, 4)
    ]


def scores_of(method: str, pipe, model: catalog.Model, ratio: float, seed: int) -> ecodiff.Scores:
    """Scores by a method's name."""
    calls = calibration_calls(model, 32)
    if method in PRESETS:
        config = model.learn_config(method, ratio, seed=seed)
        return ecodiff.learn_masks(pipe, model.prompts("calibration"), config)
    values = {
        "random": lambda: saliency.random(pipe.unet, seed),
        "magnitude": lambda: saliency.magnitude(pipe.unet),
        "wanda": lambda: saliency.wanda(pipe, calls),
        "gauss-newton": lambda: saliency.gauss_newton(pipe, calls, seed),
    }[method]()
    return ecodiff.Scores.of(pipe.unet, values, method=method)


def interval(rows: list[dict], measure: str, prompts: int) -> list[float]:
    """Mean and 95 % bootstrap interval over prompts."""
    by_prompt = np.array([row[measure] for row in rows]).reshape(prompts, -1).mean(1)
    draws = np.random.default_rng(0).integers(prompts, size=(2000, prompts))
    low, high = np.percentile(by_prompt[draws].mean(1), [2.5, 97.5])
    return [float(by_prompt.mean()), float(low), float(high)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["random", "magnitude", "wanda", "gauss-newton", "fast", "balanced"],
        help=f"random magnitude wanda gauss-newton, or a preset: {' '.join(PRESETS)}",
    )
    parser.add_argument("--learn-ratio", type=float, default=0.2, help="the size that presets steer to")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()

    model = catalog.find(options.model)
    pipe = ecodiff.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts, seeds = model.prompts("heldout")[: options.prompts], range(options.seeds)
    dense = draw(pipe, model, prompts, seeds)
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
    machine += f"torch {torch.__version__}"
    print(f"{options.model}, {len(prompts)} prompts x {len(seeds)} seeds, {machine}\n")
    print(f"{'method':<14}{'ratio':>6}  {'latent error [95 %]':<26}{'PSNR':>6}{'SSIM':>7}{'learned in':>12}")
    table = []
    for method in options.methods:
        start = time.perf_counter()
        scores = scores_of(method, pipe, model, options.learn_ratio, seed=0)
        spent = time.perf_counter() - start
        for ratio in options.ratios:
            plan = scores.plan(ratio=ratio)
            small = ecodiff.variant(pipe, plan)
            pairs = zip(dense, draw(small, model, prompts, seeds), strict=True)
            rows = [vars(fidelity(a, b)) for a, b in pairs]
            found = {m: interval(rows, m, len(prompts)) for m in MEASURES}
            removed = 1 - plan.metadata["params_pruned"] / plan.metadata["params_dense"]
            table.append({"method": method, "ratio": ratio, "removed": removed, "seconds": spent, **found})
            mean, low, high = found["latent_error"]
            error = f"{mean:.4f} [{low:.4f}, {high:.4f}]"
            print(
                f"{method:<14}{removed:>6.1%}  {error:<26}{found['psnr'][0]:>6.1f}"
                f"{found['ssim'][0]:>7.3f}{spent:>10.0f} s",
                flush=True,
            )
    options.out.write_text(
        json.dumps({"model": options.model, "machine": machine, "rows": table}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
