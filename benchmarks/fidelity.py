"""Which units to remove: every method on the same model, the same parameters removed, the same noise.

    python benchmarks/fidelity.py                        the table, benchmarks/fidelity.json, the figure
    python benchmarks/fidelity.py --methods fast --pairs 8 --ratios 0.2             a quick look
    python benchmarks/fidelity.py --figure               only draws the figure again

Each method ranks the units once and is cut by the same `Scores.plan` at all sizes, without and with
compensation ("+"): the closed-form update of what remains, the same for all (but for `thorough`, on more
trajectories, as its preset says). OBS-Diff brings its own.
Images are drawn at the model's default settings from held-out prompts, each with a seed of its own, the
dense and every pruned model from the same noise. Latent error is ||z0 - z0'||^2 over the variance of
z0; intervals are 95 %, by bootstrap over the (prompt, seed) pairs. Top-1 and top-5: the nearest of all
training images is the right emoji, or another skin tone or gender of it (needs npm for the images).
Trajectories: dense runs, plus three for every one that is differentiated.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import obs_diff
import torch
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).parent.parent))  # for recipes
import ecodiff
from ecodiff import catalog
from ecodiff.config import PRESETS, CompensateConfig
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.compensate import compensate_
from ecodiff.learning.methods import METHODS
from ecodiff.metrics.cost import parameters
from ecodiff.metrics.fidelity import Sample, fidelity
from ecodiff.pipelines import call_options, denoiser_of, prompt_rows
from ecodiff.units import ALL_KINDS
from recipes import data, evaluate

HERE = Path(__file__).parent
CACHE = Path.home() / ".cache" / "ecodiff" / "data"
BATCH, CALIBRATION = 8, 64  # trajectories of the one-shot scores
MEASURES = ("latent_error", "psnr", "ssim", "top1", "top5")
PUBLISHED = ("ecodiff", "obs-diff")  # besides METHODS
OURS = ("fast", "balanced", "paper", "gauss-newton", "surgeon", "thorough")
NAMES = tuple(dict.fromkeys((*METHODS, *PUBLISHED, *OURS)))
SOURCES = {name: method.source for name, method in METHODS.items()} | {
    "obs-diff": "Zhu et al. 2026, structured",
    "ecodiff": "EcoDiff as published, exact gradients",
}


@torch.inference_mode()
def draw(pipe, model: catalog.Model, prompts: list[str]) -> list[Sample]:
    """One sample a prompt, each from a seed of its own."""
    samples: list[Sample] = []
    options = call_options(pipe, model.steps, model.guidance_scale, model.size, model.extra)
    for first in range(0, len(prompts), BATCH):
        part, last = prompts[first : first + BATCH], {}

        def keep(pipe, index, timestep, kwargs, last=last):
            last["z"] = kwargs["latents"]
            return kwargs

        seeds = range(10_000 + first, 10_000 + first + len(part))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        images = pipe(part, generator=generators, callback_on_step_end=keep, **options).images
        samples += [Sample(i, z.float().clone(), 0.0) for i, z in zip(images, last["z"], strict=True)]
    return samples


class Recognition:
    """Whether images are recognised as their captions' emoji."""

    def __init__(self, prompts: list[str]):
        self.emojis, self.images = data.load(CACHE)
        rows = {emoji.caption: row for row, emoji in enumerate(self.emojis)}
        self.rows = [rows[prompt] for prompt in prompts]

    def __call__(self, samples: list[Sample]) -> list[dict]:
        drawn = np.stack([np.asarray(sample.image) for sample in samples])
        top1, top5 = evaluate.accuracy(self.rows, drawn, self.emojis, self.images)
        return [{"top1": float(a), "top5": float(b)} for a, b in zip(top1, top5, strict=True)]


def rank(
    method: str, pipe, model: catalog.Model, ratio: float, seed: int, kinds: tuple[str, ...] = ()
) -> tuple[ecodiff.Scores, int]:
    """Scores by a method's name, and what they cost in trajectories; of ecodiff's own, of some kinds only."""
    prompts, denoiser = model.prompts("calibration"), denoiser_of(pipe)
    if method not in METHODS or method in OURS:
        config = model.learn_config(method, ratio, seed=seed, **{"kinds": kinds} if kinds else {})
        scores = ecodiff.learn_masks(pipe, prompts, config)
        dense = min(config.steps * config.batch, config.trajectories)
        steps = config.warm_steps + config.steps
        scoring = METHODS.get(config.method or "")
        each, measured = (scoring.cost, scoring.orders > 1) if scoring else (4, False)
        # Orders are repaired on 24 trajectories and measured on 16, dense and by two plans.
        return scores, round(each * steps * config.batch) + dense + 72 * measured
    options = call_options(pipe, model.learn_steps, model.guidance_scale, model.size, model.extra)
    calls = [
        prompt_rows(prompts, range(first, first + 4), seed, options) for first in range(0, CALIBRATION, 4)
    ]
    chosen = METHODS[method]
    found = chosen(pipe, calls, seed, prompts)
    values = {group.name: found[group.name] for group in ecodiff.find_groups(denoiser)}
    cost = chosen.cost * CALIBRATION
    return ecodiff.Scores.of(denoiser, values, method=method), cost


def interval(values: list[float], middle=np.mean) -> list[float]:
    """Mean (or what `middle` takes) and 95 % bootstrap interval."""
    rows = np.array(values)
    draws = np.random.default_rng(0).integers(len(rows), size=(2000, len(rows)))
    low, high = np.percentile(middle(rows[draws], axis=1), [2.5, 97.5])
    return [float(middle(rows)), float(low), float(high)]


def measure(dense: list[Sample], pruned: list[Sample], recognised) -> dict[str, list[float]]:
    """{measure: [mean, low, high]}, and of the latent error the median too.

    A trajectory that turns off into another image has an error near 1: one of 64 is 0.015 of the mean.
    """
    rows = [vars(fidelity(a, b)) for a, b in zip(dense, pruned, strict=True)]
    if recognised is not None:
        rows = [row | seen for row, seen in zip(rows, recognised(pruned), strict=True)]
    found = {name: interval([row[name] for row in rows]) for name in MEASURES if name in rows[0]}
    return found | {"latent_error_median": interval([row["latent_error"] for row in rows], np.median)}


def variants(method: str, pipe, model, ratios, learn_ratio, calibration, kinds=(), seed=0):
    """(name, ratio, small, seconds, trajectories) of a method at every size."""
    start = time.perf_counter()
    if method == "obs-diff":
        for ratio in ratios:
            start = time.perf_counter()
            small = obs_diff.prune(pipe, calibration, ratio)
            yield "obs-diff +", ratio, small, time.perf_counter() - start, calibration.config.trajectories
        return
    scores, cost = rank(method, pipe, model, learn_ratio, seed, kinds)
    spent = time.perf_counter() - start
    if more := PRESETS.get(method, {}).get("repair"):
        calibration = Calibration(pipe, model.prompts("calibration"), calibration.config.on(more))
    for ratio in ratios:
        if ratio > scores.ceiling:
            print(f"{method}: its units hold {scores.ceiling:.1%} of the parameters, so not {ratio:.0%}.")
            continue
        plan = scores.plan(ratio=ratio)
        yield method, ratio, ecodiff.variant(pipe, plan), spent, cost
        small = ecodiff.variant(pipe, plan)
        compensate_(small, pipe, calibration=calibration)
        yield f"{method} +", ratio, small, spent, cost + calibration.config.trajectories


def figure(found: dict, path: Path) -> None:
    """Latent error against the share of parameters removed, every method with compensation.

    The median has a panel of its own where all rows have it.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"latent_error": "mean latent error", "latent_error_median": "median latent error"}
    shown = [kind for kind in kinds if all(kind in row for row in found["rows"])]
    drawing, panels = pyplot.subplots(1, len(shown), figsize=(8 if len(shown) < 2 else 12, 5), dpi=150)
    for kind, axes in zip(shown, np.atleast_1d(panels), strict=True):
        axes.set_prop_cycle(color=[*pyplot.get_cmap("tab10").colors, "black", "olive", "navy"])
        for method in dict.fromkeys(row["method"] for row in found["rows"] if row["method"].endswith("+")):
            rows = [row for row in found["rows"] if row["method"] == method]
            ours = method.split()[0] in OURS
            x, y = [100 * r["removed"] for r in rows], np.array([r[kind] for r in rows])
            line = axes.plot(x, y[:, 0], "o-", label=method, lw=2.5 if ours else 1.2, ms=4 if ours else 3)[0]
            axes.fill_between(x, y[:, 1], y[:, 2], color=line.get_color(), alpha=0.12, lw=0)
        axes.set(yscale="log", xlabel="parameters of the denoiser removed, %", ylabel=kinds[kind])
        axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    drawing.suptitle(f"{found['model']}, {found['pairs']} held-out prompts, compensated; bands are 95 %")
    drawing.tight_layout()
    drawing.savefig(path)


def arguments(about: str, ratios: list[float], pairs: int) -> argparse.ArgumentParser:
    """What this benchmark and benchmarks/ablation.py are told alike."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios)
    parser.add_argument("--learn-ratio", type=float, default=0.3, help="the size that presets steer to")
    parser.add_argument("--pairs", type=int, default=pairs, help="held-out prompts, a seed each")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="default: beside this script, with the model's name")
    parser.add_argument("--figure", action="store_true", help="draw the figure of --out, measure nothing")
    return parser


def opened(options: argparse.Namespace) -> tuple[catalog.Model, DiffusionPipeline]:
    """The model that was asked for, on as many threads as were."""
    if options.threads:
        torch.set_num_threads(options.threads)
    pipe = ecodiff.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    return catalog.find(options.model), pipe


def results_file(name: str, options: argparse.Namespace) -> Path:
    """Where the results go: `--out`, or beside the scripts."""
    of_model = "" if options.model == "emoji-sdxl" else f"-{options.model}"
    return options.out or HERE / f"{name}{of_model}.json"


def main() -> None:
    parser = arguments(__doc__, [0.1, 0.2, 0.3, 0.4, 0.5], 32)
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--kinds", nargs="+", choices=ALL_KINDS, default=(), help="of ecodiff's own methods")
    parser.add_argument("--seed", type=int, default=0, help="of what is ranked on")
    parser.add_argument("--repair", type=int, help="by so many trajectories (default: 40)")
    options = parser.parse_args()
    out = results_file("fidelity", options)
    if options.figure:
        figure(json.loads(out.read_text()), out.with_suffix(".png"))
        return
    model, pipe = opened(options)
    prompts = model.prompts("heldout")[: options.pairs]
    recognised = Recognition(prompts) if model.embedded else None
    dense = draw(pipe, model, prompts)
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    machine = f"{platform.processor() or platform.machine()}, {threads}, torch {torch.__version__}"
    found = {"model": options.model, "machine": machine, "pairs": len(prompts), "rows": []}
    found["learn_ratio"] = options.learn_ratio
    found["dense"] = measure(dense, dense, recognised)
    print(f"{options.model}, {len(prompts)} prompts, {machine}; dense: {found['dense']}\n")
    print(f"{'method':<17}{'removed':>8}  {'latent error [95 %]':<28}{'PSNR':>6}{'SSIM':>7}", end="")
    print(f"{'top-1':>7}{'top-5':>7}{'trajectories':>14}{'seconds':>9}")
    settings = {"inference_steps": model.learn_steps, "guidance_scale": model.guidance_scale}
    config = CompensateConfig(**settings, size=model.size, extra=model.extra)
    config = config.on(options.repair) if options.repair else config
    calibration = Calibration(pipe, model.prompts("calibration"), config)
    for method in options.methods:
        asked = (options.ratios, options.learn_ratio, calibration, tuple(options.kinds), options.seed)
        every = variants(method, pipe, model, *asked)
        for label, ratio, small, seconds, cost in every:
            params = [parameters(denoiser_of(p)) for p in (small, pipe)]
            row = {"method": label, "ratio": ratio, "removed": 1 - params[0] / params[1]}
            row |= measure(dense, draw(small, model, prompts), recognised)
            row |= {"seconds": seconds, "trajectories": cost}
            found["rows"].append(row)
            error = "{:.5f} [{:.5f}, {:.5f}]".format(*row["latent_error"])
            hits = [row.get(hit, [float("nan")])[0] for hit in ("top1", "top5")]
            print(
                f"{label:<17}{row['removed']:>8.1%}  {error:<28}{row['psnr'][0]:>6.1f}{row['ssim'][0]:>7.3f}"
                f"{hits[0]:>7.3f}{hits[1]:>7.3f}{cost:>14}{seconds:>9.0f}",
                flush=True,
            )
            out.write_text(json.dumps(found, indent=1) + "\n")
    figure(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
