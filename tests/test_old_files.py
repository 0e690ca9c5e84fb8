"""What ecodiff 0.1 wrote opens: a run, a plan, pruned folders (written by the main of November 25, 2026)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import ecodiff
from ecodiff import cli
from ecodiff.learning.learn import learn
from ecodiff.learning.state import LearnState
from ecodiff.pipelines import denoiser_of
from ecodiff.pruning.slicing import check, plan_of
from ecodiff.runs import Run
from tests.conftest import latents

DATA = Path(__file__).parent / "data"
# `prune emoji-sdxl --ratio 0.2 --preset fast`, one thread of an x86_64 CPU, torch 2.13. emoji-sdxl had
# sixteen layers in its lower transformers then, and has six since November 30.
DIGEST = "81449dd16b5382862d32f070bb5cd5ea66edbb3c8598137b69f6964adcb010f2"


@pytest.fixture(scope="module")
def larger(tmp_path_factory) -> str:
    """A folder with a model of the shapes that emoji-sdxl had, and random weights."""
    pipe = ecodiff.load("emoji-sdxl")
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    config |= {"transformer_layers_per_block": [1, 4], "reverse_transformer_layers_per_block": None}
    torch.manual_seed(0)
    pipe.register_modules(unet=UNet2DConditionModel(**config))
    folder = tmp_path_factory.mktemp("larger")
    pipe.save_pretrained(folder)
    return str(folder)


def test_a_run_of_before_is_cut_as_before():
    run = Run.open(DATA / "run-0.1")
    assert run.finished and run.model == "emoji-sdxl" and run.preset == "fast"
    assert run.plan(0.2).digest == DIGEST == ecodiff.PrunePlan.load(DATA / "plan-0.1.safetensors").digest


def test_a_run_of_before_goes_on(larger):
    """From its state: the last step is made again from the one before it, in the same vectors."""
    run, pipe = Run.open(DATA / "run-0.1"), ecodiff.load(larger)
    state = run.state()
    assert state.step == run.config.total_steps
    one_more = ecodiff.LearnConfig(**vars(run.config) | {"steps": run.config.steps + 1})
    ((after, scores),) = learn(pipe, run.prompts, one_more, LearnState.load(run.folder / "state.safetensors"))
    assert after.step == state.step + 1 and after.vectors.keys() == state.vectors.keys()
    check(scores.plan(ratio=0.2), pipe.unet)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_pruned_folder_of_before_opens(name, tmp_path):
    pipe = ecodiff.load(DATA / f"pruned-{name}-0.1")
    pipe.set_progress_bar_config(disable=True)
    plan = plan_of(denoiser_of(pipe))
    assert any(not keep.any() for keep in plan.values()), "it has an emptied layer"
    before = latents(pipe)
    again = ecodiff.load(ecodiff.save(pipe, tmp_path / "again"))
    again.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents(again), before, rtol=1e-5, atol=1e-5)


def test_the_command_line_cuts_a_run_of_before(larger, tmp_path, capsys):
    shutil.copytree(DATA / "run-0.1", tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model": larger}))
    out = ["--out", str(tmp_path / "out"), "--ratio", "0.2", "--no-compensate", "--json"]
    assert cli.main(["prune", str(tmp_path / "run"), *out]) == 0
    assert DIGEST in capsys.readouterr().out
