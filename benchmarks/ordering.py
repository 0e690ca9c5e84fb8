"""What ordering one layer's units takes by `surgeon`, at true widths, with random statistics.

    python benchmarks/ordering.py                  feed-forwards of SDXL and FLUX.1, its single blocks
    python benchmarks/ordering.py --layers 15360x3072

A layer of n features that gives m is prepared (the inverse of its covariance) and loses blocks of 64. Prints
seconds of both, and of all n / 64 blocks.
"""

import argparse
import json
import time

import torch
from common import device_name, seconds

from ecodiff.learning.candidates import Candidate, Consumer
from ecodiff.units import PruneGroup, Slot, units

BLOCKS = 5  # that are timed


def layer(features: int, out: int, device: str) -> Consumer:
    """A consumer of random statistics, prepared as the surgeon does."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(features + 64, features, generator=generator).to(device)
    moment = x.T @ x / len(x)
    weight = torch.randn(out, features, generator=generator).to(device) / features**0.5
    inverse = torch.linalg.inv(moment + 0.05 * torch.eye(features, device=device))
    return Consumer(weight, inverse, weight.clone(), moment, 1)  # of an identity as metric


@torch.no_grad()
def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--layers", nargs="+", default=["5120x1280", "12288x3072", "15360x3072"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for text in options.layers:
        features, out = map(int, text.split("x"))
        start = time.perf_counter()
        consumer = layer(features, out, options.device)
        prepared = time.perf_counter() - start
        group = PruneGroup("ff", "ffn", features, (Slot("out", "in", units(features)),), ())
        candidate = Candidate(group, [(consumer, group.consumers[0].index)], 1.0, 1.0)

        def remove(candidate=candidate) -> None:
            for _ in range(BLOCKS):
                candidate.take()
                candidate.refresh()

        each = seconds(remove) / BLOCKS
        found = {
            "features": features,
            "outputs": out,
            "device": device_name() if options.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
        }
        found |= {"prepared": round(prepared, 1), "block": round(each, 3), "all": round(each * features / 64)}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
