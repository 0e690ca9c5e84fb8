"""What pruning buys in time: dense against pruned, ideal (MACs) against measured; swapping and loading.

    python benchmarks/speed.py                    embedded model, the device that ecodiff would take
    python benchmarks/speed.py --compile          with torch.compile too
    python benchmarks/speed.py --example --model emoji-flux      as the model's example run ranks units
    python benchmarks/speed.py --run DIR                         as a run of `python -m ecodiff prune` does

Times are medians over interleaved repeats of one denoiser call, as multiples of the dense one's in the same
round. Without a run the ranking is of weight magnitudes, of heads, neurons and channels only: then which
units go does not matter for time, how many a layer does.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from common import call_of, device_name, keep_results, seconds

import ecodiff
from ecodiff import catalog
from ecodiff.architectures import unit_parameters
from ecodiff.learning import scoring
from ecodiff.metrics import cost
from ecodiff.pipelines import denoiser_calls, denoiser_of, moved
from ecodiff.pruning.scores import Scores
from ecodiff.units import ALL_KINDS


@torch.inference_mode()
def ratios(denoisers: dict, args: tuple, kwargs: dict, repeats: int) -> dict[str, float]:
    """Speed-up of each over the dense one, in one call."""
    rounds = {name: [] for name in denoisers}
    for _ in range(repeats + 1):
        for name, denoiser in denoisers.items():
            rounds[name].append(seconds(lambda d=denoiser: d(*args, **kwargs)))
    dense = rounds["dense"][1:]
    return {
        name: round(statistics.median(a / b for a, b in zip(dense, found[1:], strict=True)), 3)
        for name, found in rounds.items()
    }


def ranking(pipe, model: catalog.Model, run: Path | None) -> Scores:
    """Units by their weights' magnitude; or as a run ranks them."""
    denoiser = denoiser_of(pipe)
    if run:
        known = Scores.load(run / "scores.safetensors")
        values, bases = known.values, known.bases
    else:
        worth, bases = scoring.magnitude(pipe), {}
        values = {g.name: worth[g.name] / unit_parameters(denoiser, g) for g in ecodiff.find_groups(denoiser)}
    groups = [group for group in ecodiff.find_groups(denoiser, ALL_KINDS) if group.name in values]
    return Scores.of(denoiser, values, cost.unit_macs(pipe, call_of(pipe, model, 1), groups), bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="emoji-sdxl")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--example", action="store_true")
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = catalog.find(options.model)
    load = seconds(ecodiff.load, options.model)
    pipe = ecodiff.load(options.model)
    denoiser = denoiser_of(pipe)
    run = Path(model.source) / "example" if options.example else options.run
    scores = ranking(pipe, model, run)
    name = f"{options.model}, {run.name} run" if run else options.model
    found = {"model": name, "device": device_name(), "threads": torch.get_num_threads()}
    found |= {"torch": torch.__version__, "load_s": round(load, 2), "rows": []}
    for ratio in options.ratios:
        plans = {name: scores.plan(ratio=ratio, align=name == "aligned") for name in ("aligned", "unaligned")}
        variants = {name: denoiser_of(ecodiff.variant(pipe, plan)) for name, plan in plans.items()}
        ideal = 1 / (1 - scores.removed(plans["aligned"], scores.macs) / scores.total_macs)
        for batch in (1, 4):
            args, kwargs = moved(
                denoiser_calls(pipe, call_of(pipe, model, batch), limit=1)[0], denoiser.device
            )
            row = {"ratio": ratio, "batch": batch, "ideal": round(ideal, 3)}
            row |= ratios({"dense": denoiser} | variants, args, kwargs, options.repeats)
            if options.compile:
                compiled = {"dense": torch.compile(denoiser), "compiled": torch.compile(variants["aligned"])}
                row["compiled"] = ratios(compiled, args, kwargs, options.repeats)["compiled"]
            found["rows"].append(row)
            print(row, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            small = ecodiff.variant(pipe, plans["aligned"])
            ecodiff.save(small, Path(folder) / "small")
            plans["aligned"].save(Path(folder) / "plan.safetensors")
            swap = statistics.median(seconds(ecodiff.variant, pipe, plans["aligned"]) for _ in range(5))
            reload = seconds(ecodiff.load, Path(folder) / "small")
            plan = seconds(ecodiff.PrunePlan.load, Path(folder) / "plan.safetensors")
        found[f"at {ratio:.0%}"] = {
            "hot_swap_s": round(swap, 3),
            "load_folder_s": round(reload, 2),
            "load_plan_s": round(plan, 4),
        }
    keep_results(Path(__file__).with_suffix(".json"), found)


if __name__ == "__main__":
    main()
