"""Two processes (gloo, on the CPU) learn what one learns."""

import os
import subprocess
import sys

import pytest
import torch

from ecodiff.errors import BudgetError
from ecodiff.learning import distributed
from ecodiff.runs.folder import Run


def prune(model, folder, *launcher: str) -> Run:
    command = ["-m", "ecodiff", "prune", model, "--preset", "fast", "--quiet", "--no-compensate"]
    result = subprocess.run(
        [sys.executable, *launcher, *command, "--run", folder / "run", "--out", folder / "out"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ECODIFF_DEVICE": "cpu"},
    )
    assert result.returncode == 0, result.stderr
    return Run.open(folder / "run")


def test_two_processes_learn_the_same(tiny_sdxl, tmp_path):
    tiny_sdxl.save_pretrained(tmp_path / "tiny")
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    one = prune(tmp_path / "tiny", tmp_path / "one")
    two = prune(tmp_path / "tiny", tmp_path / "two", *launcher)
    assert two.finished and (tmp_path / "two" / "out" / "model_index.json").is_file()
    for name, values in one.scores().values.items():
        torch.testing.assert_close(two.scores().values[name], values, rtol=1e-3, atol=0)
    plans = [run.scores().plan(ratio=0.2) for run in (one, two)]
    assert plans[0].digest == plans[1].digest
    losses = [run.state().history[-1]["loss"] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 3)
    with pytest.raises(BudgetError, match="4 cannot be shared evenly by 3"):
        distributed.share(4)
