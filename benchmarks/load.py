"""Many visitors drawing while one prunes: errors, memory, and whether the run ends as it would have alone.

    python -m benchmarks.load                     50 visitors, five minutes, the real app.py on this machine

Every visitor draws a finished run's images, dense and pruned, one after the other, over the API. Errors are
counted by their text: the queue's own ("Queue is full") is the app's answer to too many at once.
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import torch
from gradio_client import Client

from benchmarks.server import serve
from ecodiff import catalog
from ecodiff.checkpoints import loading
from ecodiff.runs.folder import Run
from ecodiff.runs.loop import advance

OUT = Path(__file__).with_suffix(".json")
MODEL = "emoji-sdxl"


def memory_mb() -> float:
    """Resident memory of the app: the youngest child of this process that runs app.py."""
    servers = [p for p in psutil.Process().children(recursive=True) if "app" in p.cmdline()]
    return sum(p.memory_info().rss for p in servers) / 1e6


def learned(client: Client, run: str) -> dict:
    while True:
        found = client.predict(run, api_name="/prune_status")
        if found["stage"] not in ("queued", "loading", "learning", "calibrating"):
            return found
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--visitors", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    outcomes, images, memory = Counter(), [], []
    with tempfile.TemporaryDirectory() as home, serve(Path(home)) as url:
        client = Client(url, verbose=False)
        first = client.predict(MODEL, 0.2, "fast", 0, api_name="/prune_start")["run"]
        learned(client, first)
        second = client.predict(MODEL, 0.3, "fast", 1, api_name="/prune_start")["run"]
        until = time.monotonic() + options.seconds

        def visit(number: int) -> None:
            own = Client(url, verbose=False)
            while time.monotonic() < until:
                start = time.monotonic()
                try:
                    own.predict(first, 0.2, "red apple", number, 4, 3.0, True, api_name="/compare")
                    outcomes["drawn"] += 1
                    images.append(time.monotonic() - start)
                except Exception as error:  # every kind is counted and shown
                    outcomes[str(error)[:80]] += 1
                    time.sleep(1)

        visitors = [threading.Thread(target=visit, args=(n,)) for n in range(options.visitors)]
        for visitor in visitors:
            visitor.start()
        while any(visitor.is_alive() for visitor in visitors):
            memory.append(round(memory_mb()))
            time.sleep(10)
        last = learned(client, second)
        crowded = Run.open(Path(home) / "runs" / second).scores()
        known = catalog.find(MODEL)
        alone = Run.create(
            Path(home) / "alone", MODEL, known.learn_config("fast", 0.3, seed=1), known.prompts("calibration")
        )
        advance(alone, loading.load(MODEL))
        same = all(torch.equal(v, crowded.values[n]) for n, v in alone.scores().values.items())
    found = {"visitors": options.visitors, "seconds": options.seconds, "cores": os.cpu_count()}
    found |= {"outcomes": dict(outcomes), "run": last["stage"], "same_scores": same, "memory_mb": memory}
    print(json.dumps(found, indent=1))
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
