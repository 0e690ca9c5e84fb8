"""What the benchmarks share: the clock, the device's name, a model's own call, the file of results."""

import json
import os
import platform
import time
from pathlib import Path

import torch

from ecodiff import catalog
from ecodiff.pipelines import call_options, prompt_rows


def seconds(function, *args) -> float:
    """Time of one call, on the device too."""
    start = time.perf_counter()
    function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_name() -> str:
    """The GPU, or what kind of CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def call_of(pipe, model: catalog.Model, batch: int, steps: int | None = None) -> dict:
    """Arguments of a pipeline's call: `batch` calibration prompts, the model's defaults."""
    options = call_options(pipe, steps or model.steps, model.guidance_scale, model.size, model.extra)
    return prompt_rows(model.prompts("calibration"), range(batch), 0, options)


def keep_results(out: Path, found: dict) -> None:
    """Print what was found and write it beside what other models and devices gave.

    $ECODIFF_RESULTS is a folder for it in place of this one (benchmarks/gpu.py).
    """
    out = Path(os.environ.get("ECODIFF_RESULTS", out.parent)) / out.name
    print(json.dumps(found, indent=1))
    results = json.loads(out.read_text()) if out.exists() else {}
    name = f"{found['model']}, {found['device']}"
    out.write_text(json.dumps(results | {name: found}, indent=1) + "\n")
