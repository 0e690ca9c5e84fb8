"""The whole job on a device that is not the CPU: nothing is made, or left, where it does not belong."""

import json
import os
import subprocess
import sys

import pytest
from torch.utils import backend_registration

from tests.denoisers import ROWS
from tests.elsewhere import pipelines

JOBS = [*(f"{name} pipeline" for name in pipelines()), "offloaded", *ROWS]
JOBS += [f"{name} streamed" for name in ("sdxl", "sd3.5", "Sana")]
JOBS += ["sdxl lent", "sdxl rounded", "sdxl surgeon", "flux-dev surgeon"]

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are made in Python",
)


@pytest.fixture(scope="session")
def found() -> dict[str, str]:
    command, env = [sys.executable, "-m", "tests.elsewhere"], os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", JOBS)
def test_the_job_is_done_elsewhere(found, name):
    assert found[name] == ""


def test_devices_cannot_be_mixed():
    code = """
import torch
from tests.elsewhere import elsewhere
with elsewhere():
    there = torch.ones(2, device="elsewhere:0", requires_grad=True)
    (2 * there.exp()).sum().backward()
    assert there.grad.cpu().equal(2 * torch.ones(2).exp())
    try:
        there + torch.ones(2)
    except RuntimeError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "two devices" in result.stdout, result.stderr
