"""The examples run as they stand, on the embedded models, with presets and calibration shortened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What makes them short; the rest of each is what a person would run.
SHORT = """
import dataclasses, runpy, sys
from ecodiff import catalog, config
config.PRESETS["fast"] = {"warm_steps": 1, "steps": 1, "batch": 2, "inference_steps": 4}
drawing, learned = catalog.Model.drawing, catalog.Model.learn_config
catalog.Model.drawing = lambda self, *_: drawing(self) | {"steps": 4}
catalog.Model.learn_config = lambda self, *a, **k: learned(self, *a, **k | {"inference_steps": 4})
full = catalog.Model.compensation
few = {"trajectories": 8, "heldout": 4, "batch": 4, "calls": 2, "inference_steps": 4}
catalog.Model.compensation = lambda self: dataclasses.replace(full(self), **few)
"""


def run(code: str, folder: Path) -> str:
    options = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def example(name: str, *arguments: str) -> str:
    return SHORT + f"sys.argv = {[name, *arguments]!r}\nrunpy.run_path({str(EXAMPLES / name)!r})\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    assert "parameters, saved in emoji-sdxl-eco20" in run(example("prune.py"), folder)
    return folder


def test_a_pruned_model_opens_with_plain_diffusers(folder):
    code = (EXAMPLES / "load_with_diffusers.py").read_text()
    lines = [
        "import sys",
        "sys.modules['ecodiff'] = None",
        "sys.argv = ['x', 'emoji-sdxl-eco20', 'cat', 'cat.png']",
    ]
    run("\n".join([*lines, code]), folder)
    assert (folder / "cat.png").stat().st_size > 500


def test_sizes_and_own_prompts(folder):
    assert len(run(example("compare_sizes.py"), folder).splitlines()) == 5
    (folder / "mine.txt").write_text("\n".join(f"a red apple {n}" for n in range(10)))
    assert "2 of your prompts" in run(example("own_prompts.py", "mine.txt"), folder)


def test_the_notebook(tmp_path):
    cells = json.loads((EXAMPLES / "prune.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    run(SHORT + code, tmp_path)
    assert (tmp_path / "emoji-sdxl-eco20" / "model_index.json").is_file()
