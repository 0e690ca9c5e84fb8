"""SDXL at its true size on a CPU, with random weights: every step of the main job once.

    python benchmarks/full_size.py        about 11 GB of memory and 10 GB of disk

The UNet is the published one (2,567,463,684 parameters, bfloat16), the rest is small (random_weights.py).
Latents are 16x16, two time steps.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from random_weights import pipeline

import ecodiff
from ecodiff.learning.learn import learn
from ecodiff.metrics.cost import parameters


def checksums(module: torch.nn.Module) -> dict[str, int]:
    """Of the bits of every bfloat16 weight."""
    return {name: int(p.view(torch.int16).long().sum()) for name, p in module.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    took: dict[str, dict] = {}

    @contextmanager
    def step(name: str):
        start = time.perf_counter()
        yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        took[name] = {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2)}
        print(f"{name:<22}{took[name]['seconds']:>8.1f} s   peak {peak:.1f} GB", flush=True)

    drawing = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}
    folder = Path(tempfile.mkdtemp())
    try:
        with step("build"):
            pipe = pipeline("sdxl", vae_blocks=2)
        dense = parameters(pipe.unet)
        with step("find groups"):
            groups = ecodiff.find_groups(pipe.unet, ecodiff.LearnConfig().kinds)
        with step("warm start, 1 batch"):
            config = ecodiff.LearnConfig(warm_steps=1, steps=1, batch=1, inference_steps=2, size=32)
            steps = learn(pipe, ["red apple"], config)
            next(steps)
        with step("learning step"):
            _, scores = next(steps)
        with step("plan"):
            plan = scores.plan(ratio=0.2)
        with step("slice"):
            ecodiff.slice_(pipe.unet, plan)
        with step("draw"), torch.no_grad():
            before = pipe("red apple", generator=torch.Generator().manual_seed(0), **drawing).images
        with step("save"):
            ecodiff.save(pipe, folder / "small")
        pruned, expected = parameters(pipe.unet), plan.metadata["params_pruned"]
        assert pruned == expected, (pruned, expected)
        sums = checksums(pipe.unet)
        del pipe
        with step("reload"):
            small = ecodiff.load(folder / "small", dtype=torch.bfloat16)
        assert checksums(small.unet) == sums, "reloaded weights differ"
        with step("draw again"), torch.no_grad():
            after = small("red apple", generator=torch.Generator().manual_seed(0), **drawing).images
        # Same bits at other addresses: bfloat16 sums come in another order, 70 random layers deep.
        close = float((before.float() - after.float()).abs().max() / before.float().abs().max())
        found = {"dense": dense, "pruned": pruned, "groups": len(groups), "difference": close, "took": took}
        print(json.dumps(found | {"took": None}))
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
