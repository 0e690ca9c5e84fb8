"""What it costs to learn with weights in main memory: time and memory of the same step, whole and streamed.

    python benchmarks/streaming.py --model sdxl --random       true size, random weights; on a GPU

One Gauss-Newton sample of a batch, blocks recomputed, first with all weights on the device, then streamed
(`ecodiff.learning.streaming`), in one process. Peaks are the GPU's own count; a CPU brings nothing anywhere,
so there the two differ by the hooks alone.
"""

import argparse
import json

import random_weights
import torch
from common import call_of, device_name, seconds

import ecodiff
from ecodiff import catalog, machine
from ecodiff.checkpoints import loading
from ecodiff.learning.checkpointing import Keep
from ecodiff.learning.footprint import footprint
from ecodiff.learning.gauss_newton import gauss_newton_sample
from ecodiff.learning.streaming import stream_, unstreamed
from ecodiff.pipelines import denoiser_of, stream


def measured(pipe, call: dict, repeats: int) -> tuple[dict, dict]:
    """{"seconds": the fastest, "peak": bytes or None}, and what the sample found."""
    groups, found, times = ecodiff.find_groups(denoiser_of(pipe)), {}, []
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def once() -> None:
        fresh = call | {
            "generator": [torch.Generator().manual_seed(row) for row in range(len(call["prompt"]))]
        }
        found.update(gauss_newton_sample(pipe, groups, fresh, stream("probe", 0), Keep(blocks=True)))

    once()
    times = [seconds(once) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"seconds": round(min(times), 3), "peak": peak}, dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--random", action="store_true", help="true size, random weights")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    known, device = catalog.MODELS[options.model], machine.device()
    where = "cpu" if options.random else device
    pipe = random_weights.pipeline(options.model, where) if options.random else ecodiff.load(options.model)
    call = call_of(pipe, known, options.batch, options.steps)
    weights = next(denoiser_of(pipe).parameters()).element_size()
    need = footprint(loading.empty_denoiser(options.model), **known.footprint(weights))
    found = {"model": options.model, "device": device_name(), "batch": options.batch, "steps": options.steps}
    found["planned"] = {"whole": need.learn, "streamed": need.learn_streamed}
    results = {}
    for way in ("streamed", "whole") if options.random else ("whole", "streamed"):
        try:
            if way == "streamed":
                stream_(pipe, device)
            else:
                unstreamed(denoiser_of(pipe))
                pipe.to(device)
            found[way], results[way] = measured(pipe, call, options.repeats)
        except torch.OutOfMemoryError:
            found[way] = "out of memory"
    if len(results) == 2:
        found["slower"] = round(found["streamed"]["seconds"] / found["whole"]["seconds"], 2)
        pairs = zip(results["whole"].values(), results["streamed"].values(), strict=True)
        found["same"] = all(torch.equal(a, b) for a, b in pairs)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
