"""Make the finished run that ships with an embedded model: `python -m recipes.example emoji-sdxl`.

It is learned as the page learns it, with the model's default preset at 20 %, and drawn at six sizes.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import ecodiff
from ecodiff import catalog
from ecodiff.learning.calibration import Calibration
from ecodiff.learning.methods import measured_best
from ecodiff.pipelines import denoiser_of
from ecodiff.runs import Run
from ecodiff.runs.loop import advance
from ecodiff.runs.pictures import FILE, SIZES, Painter

FILES = ("run.json", "state.safetensors", "scores.safetensors", FILE)


def make(model: str) -> None:
    """Learn, draw, and put the files beside the model."""
    known, pipe = catalog.MODELS[model], ecodiff.load(model)
    pipe.set_progress_bar_config(disable=True)
    preset = measured_best(denoiser_of(pipe), "fast")
    with tempfile.TemporaryDirectory() as scratch:
        config = known.learn_config(preset, 0.2)
        run = Run.create(Path(scratch) / "run", model, config, known.prompts("calibration"), preset)
        run.name = f"Example: {known.title}"
        run.save()
        advance(run, pipe, lambda state, seconds: print(f"step {state.step}, {seconds:.0f} s", flush=True))
        painter = Painter(run, pipe)
        calibration = Calibration(pipe, run.learned_on, known.compensation())
        for ratio in SIZES:
            small = ecodiff.variant(pipe, plan := run.plan(ratio))
            ecodiff.compensate_(small, pipe, calibration=calibration)
            row = painter.paint(small, plan, ratio, repaired=True)["sizes"][-1]
            print(f"{ratio:.0%}: PSNR {row['psnr']}", flush=True)
        folder = Path(known.source) / "example"
        folder.mkdir(exist_ok=True)
        for name in FILES:
            shutil.copyfile(run.folder / name, folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    for name in parser.parse_args().models:
        make(name)
