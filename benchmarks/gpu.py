"""Everything that is to be measured on a machine with a GPU, in parts of at most ten minutes.

    python benchmarks/gpu.py --out gpu             all parts but those that are done already
    python benchmarks/gpu.py --out gpu --list      which there are
    python benchmarks/gpu.py --out gpu tests memory
    python benchmarks/gpu.py --out gpu --dry-run   on the embedded models and whatever device there is

Each part is a process of its own with a limit of ten minutes. What it printed, how it ended and its figures
are in PART.json. A part that failed or ran out of time is run again by the next call.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 600  # seconds of a part
RANDOM = ("--random",)  # true size, random weights

# {part: command}
PARTS: dict[str, list[str]] = {
    "tests": ["-m", "pytest", "-q", "-x", "tests/learning", "tests/pruning", "tests/metrics"],
    "learning-emoji-sdxl": ["benchmarks/learning.py", "--model", "emoji-sdxl"],
    "learning-emoji-flux": ["benchmarks/learning.py", "--model", "emoji-flux"],
    "learning-sdxl": ["benchmarks/learning.py", "--model", "sdxl", *RANDOM, "--repeats", "2"],
    "learning-flux": [
        "benchmarks/learning.py",
        "--model",
        "flux-dev",
        *RANDOM,
        "--batch",
        "1",
        "--repeats",
        "2",
    ],
    "speed-emoji-sdxl": ["benchmarks/speed.py", "--model", "emoji-sdxl", "--compile"],
    "speed-emoji-flux": ["benchmarks/speed.py", "--model", "emoji-flux", "--compile"],
    "streaming-sdxl": ["benchmarks/streaming.py", "--model", "sdxl", *RANDOM],
    "streaming-flux": ["benchmarks/streaming.py", "--model", "flux-dev", *RANDOM, "--repeats", "1"],
    "inside-heads": ["benchmarks/inside_heads.py"],
    "ordering": ["benchmarks/ordering.py"],
    "ordering-cpu": ["benchmarks/ordering.py", "--device", "cpu", "--layers", "12288x3072"],
    "memory-sdxl": ["benchmarks/gpu.py", "--memory", "sdxl"],
    "memory-flux": ["benchmarks/gpu.py", "--memory", "flux-dev"],
    "quality-emoji-flux": ["benchmarks/fidelity.py", "--model", "emoji-flux", "--methods", "surgeon", "fast"],
    "quality-thorough": ["benchmarks/fidelity.py", "--model", "emoji-flux", "--methods", "thorough"],
    "healing": ["benchmarks/healing.py", "--ratios", "0.4"],
}
DRY: dict[str, list[str]] = {
    "tests": ["-m", "pytest", "-q", "-x", "tests/metrics", "-k", "turn"],
    "learning-emoji-sdxl": [
        "benchmarks/learning.py",
        *("--model", "emoji-flux", "--repeats", "1", "--steps", "3", "--batch", "2"),
    ],
    "speed-emoji-sdxl": [
        "benchmarks/speed.py",
        "--model",
        "emoji-turbo",
        "--repeats",
        "2",
        "--ratios",
        "0.2",
    ],
    "ordering": ["benchmarks/ordering.py", "--layers", "512x128"],
    "streaming-flux": ["benchmarks/streaming.py", "--repeats", "1"],
    "memory-sdxl": ["benchmarks/gpu.py", "--memory", "emoji-sdxl"],
    "memory-flux": ["benchmarks/gpu.py", "--memory", "emoji-flux"],
}


def memory(name: str) -> dict:
    """The planner's bytes beside those that a GPU counts, of drawing one image: dense, and at 20 and 40 %.

    On a device that does not count them, what was measured is None.
    """
    import random_weights
    import torch

    import ecodiff
    from ecodiff import catalog, machine
    from ecodiff.checkpoints import loading
    from ecodiff.learning.footprint import footprint
    from ecodiff.metrics.fidelity import generate
    from ecodiff.pipelines import denoiser_of
    from ecodiff.pruning.scores import Scores

    known, device = catalog.MODELS[name], machine.device()
    pipe = ecodiff.load(name, device=device) if known.embedded else random_weights.pipeline(name, device)
    size = known.size or 1024
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    dense = denoiser_of(pipe)
    itemsize = next(dense.parameters()).element_size()
    others = sum(p.numel() for part in parts if part is not dense for p in part.parameters())
    need = footprint(loading.empty_denoiser(name), itemsize, others, size, (known.guidance_scale or 0) > 1)
    rows, scores = [], Scores.unranked(dense)
    for ratio in (0.0, 0.2, 0.4):
        small = ecodiff.variant(pipe, scores.plan(ratio=ratio)) if ratio else pipe
        sample = generate(small, "a red apple", 0, steps=2, guidance_scale=known.guidance_scale, size=size)
        estimate = need.pruned(ratio).draw
        rows.append({"ratio": ratio, "planned": estimate, "measured": sample.peak_bytes})
        print(json.dumps(rows[-1]), flush=True)
    return {"model": name, "device": device, "size": size, "rows": rows}


def run(part: str, command: list[str], out: Path) -> bool:
    """Run one part, and keep how it went; True if it ended well."""
    begun, file = time.monotonic(), out / f"{part}.json"
    found: dict = {"part": part, "command": command}
    try:
        # What scripts keep beside themselves is kept in this folder.
        settings = os.environ | {"ECODIFF_RESULTS": str(out.resolve())}
        asked = [sys.executable, *command]
        done = subprocess.run(
            asked, cwd=HERE.parent, env=settings, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        found |= {"ended": done.returncode, "printed": done.stdout[-8000:], "errors": done.stderr[-2000:]}
        found["figures"] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    except subprocess.TimeoutExpired as over:
        printed = over.stdout or b""
        found |= {"ended": "out of time", "printed": printed.decode(errors="replace")[-8000:]}
    found["seconds"] = round(time.monotonic() - begun, 1)
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{part}: {found['ended'] or 'done'}, {found['seconds']:.0f} s", flush=True)
    return found["ended"] == 0


def done(file: Path) -> bool:
    """True if a part ended well before."""
    return file.is_file() and json.loads(file.read_text(encoding="utf-8"))["ended"] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("parts", nargs="*", help="some of them; default: all")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the JSON files")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="on the embedded models, short")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory(options.memory)))
        return 0
    parts = DRY if options.dry_run else PARTS
    wanted = options.parts or list(parts)
    if unknown := set(wanted) - set(parts):
        parser.error(f"There is no part {', '.join(sorted(unknown))}. Parts: {', '.join(parts)}.")
    if options.list:
        print("\n".join(f"{part}: python {' '.join(command)}" for part, command in parts.items()))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    ended = [run(part, parts[part], options.out) for part in wanted if not done(options.out / f"{part}.json")]
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
