"""What a learning step costs: time in dense trajectories, memory against time steps and what is kept.

    python benchmarks/learning.py                      embedded model, the device that ecodiff would take
    python benchmarks/learning.py --model emoji-flux --threads 1
    python benchmarks/learning.py --model sdxl --random          true size, random weights; for a GPU
    python benchmarks/learning.py --model flux-dev --random --batch 1

A learning step is one gradient of the objective with respect to all gates, through the whole trajectory.
Its floor is a forward pass, a recomputation and a backward pass that skips weight gradients: about three
forward passes; two if nothing is recomputed. The last call need not be: at the end it is there anyway.
Times are the fastest of some repeats, as multiples of the fastest dense trajectory between them: what else
the machine does makes long steps slower more often than short ones. Memory is the peak of a process of
its own, less what the process held before (on CUDA: torch's own count). On a CPU every tensor is given a
mapping of its own, so that tensors are counted; "glibc's heap" is the same without that.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import random_weights
import torch
from common import call_of, device_name, keep_results, seconds

import ecodiff
from ecodiff import catalog, machine
from ecodiff.architectures import find_groups
from ecodiff.errors import exhausted
from ecodiff.learning import memory
from ecodiff.learning.checkpointing import ALL, NOTHING, Keep
from ecodiff.pipelines import denoiser_of

OUT = Path(__file__).with_suffix(".json")
STEPS = (5, 10, 20, 50)


def dense(pipe, call: dict) -> None:
    with ecodiff.trajectory(pipe, checkpoint=False) as run, torch.no_grad():
        run(**call)


def step(pipe, call: dict, keep: Keep) -> None:
    """Forward and backward through a whole trajectory, gates on every unit."""
    denoiser = denoiser_of(pipe)
    groups = find_groups(denoiser, ecodiff.LearnConfig().kinds)
    masks = {g.name: torch.ones(g.size, device=denoiser.device, requires_grad=True) for g in groups}
    with ecodiff.masked(denoiser, masks), ecodiff.trajectory(pipe, keep) as run:
        z0 = run(**call).float()
        torch.autograd.grad(z0.square().mean(), list(masks.values()), allow_unused=True)


def times(pipe, call: dict, keeps: dict[str, Keep], repeats: int) -> dict[str, float]:
    """Multiples of a dense trajectory. One way after the other, as a run repeats one: what the steps of
    another way left of the allocator's heap would be paid for by the next. Dense ones are in between."""
    dense(pipe, call)
    found = {}
    for name, keep in keeps.items():
        try:
            step(pipe, call, keep)
            pairs = [(seconds(step, pipe, call, keep), seconds(dense, pipe, call)) for _ in range(repeats)]
            fastest = [min(times) for times in zip(*pairs, strict=True)]
        except (MemoryError, RuntimeError) as error:
            if not exhausted(error):
                raise
        else:
            found[name] = round(fastest[0] / fastest[1], 2)
    return found


def peak(options, steps: int, keep: Keep, heap: bool = False) -> float:
    """Megabytes that a step adds, in a fresh process; with `heap`, as glibc's allocator comes."""
    asked = [str(steps), json.dumps([keep.recomputed, keep.blocks])]
    command = [sys.executable, "-W", "ignore", __file__, "--model", options.model, "--measure", *asked]
    command += ["--batch", str(options.batch), "--threads", str(torch.get_num_threads())]
    command += ["--size", str(options.size)] * bool(options.size) + ["--random"] * options.random
    env = os.environ | ({} if heap else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return round(float(done.stdout.split()[-1]), 1)


def measure(options) -> None:
    model, pipe = opened(options)
    steps, keep = int(options.measure[0]), Keep(*json.loads(options.measure[1]))
    dense(pipe, call_of(pipe, model, options.batch, 2))
    call = call_of(pipe, model, options.batch, steps)
    before = resident(reset=True)
    step(pipe, call, keep)
    print((resident(peak=True) - before) / 1e6)


def resident(reset: bool = False, peak: bool = False) -> int:
    """Bytes in use now, or at most since the last reset."""
    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def opened(options):
    """The model, as asked for, and its pipeline."""
    model = catalog.find(options.model)
    model = replace(model, size=options.size or model.size, learn_steps=options.steps or model.learn_steps)
    if options.random:
        return model, random_weights.pipeline(options.model, machine.device())
    return model, ecodiff.load(options.model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--random", action="store_true", help="true size, random weights: sdxl, flux-dev")
    parser.add_argument("--size", type=int, help="of the image")
    parser.add_argument("--steps", type=int, help="of a trajectory")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.measure:
        measure(options)
        return
    model, pipe = opened(options)
    counts = [model.learn_steps] if options.random or options.steps else STEPS
    found = {"model": options.model, "batch": options.batch, "device": device_name()}
    found |= {"random weights": options.random, "size": model.size}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "steps": model.learn_steps}
    call = call_of(pipe, model, options.batch, model.learn_steps)
    ways = {
        "all recomputed": NOTHING,
        "all but the last": Keep(model.learn_steps - 1),
        "half kept": Keep(model.learn_steps // 2),
        "all kept": ALL,
        "blocks recomputed": Keep(blocks=True),
    }
    found["times"] = times(pipe, call, ways, options.repeats)
    groups = find_groups(denoiser_of(pipe), ecodiff.LearnConfig().kinds)
    planned = memory.plan(pipe, call, groups, model.learn_steps)
    found["activations_mb"] = round(planned.activations / 1e6, 1)
    found["by_block_mb"] = round(planned.by_block / 1e6, 1)
    found["planned"] = planned.words()
    found["peak_mb"] = {
        name: {str(steps): peak(options, steps, keep(steps)) for steps in lengths}
        for name, keep, lengths in (
            ("all recomputed", lambda steps: NOTHING, counts),
            ("all but the last", lambda steps: Keep(steps - 1), counts),
            ("blocks recomputed", lambda steps: Keep(blocks=True), counts[:2]),
            ("all kept", lambda steps: ALL, counts[:2]),
        )
        if name in found["times"]  # the others are too much for this machine
    }
    if "all kept" in found["times"]:
        found["peak_mb"]["all kept, glibc's heap"] = {str(s): peak(options, s, ALL, True) for s in counts[:2]}
    keep_results(OUT, found)


if __name__ == "__main__":
    main()
