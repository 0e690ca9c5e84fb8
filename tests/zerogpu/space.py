"""The app as a ZeroGPU Space on a CPU build of torch: `python -m tests.zerogpu.space`.

The real `spaces` package forks, queues and pickles. What is not real: moving tensors to CUDA, its memory
and quotas; pipelines stay on the CPU (ECODIFF_DEVICE). The scheduler is that of scheduler.py, at
SPACES_ZERO_DEVICE_API_URL.
"""

import os
import tempfile
from pathlib import Path

scratch = Path(tempfile.mkdtemp(prefix="zerogpu-"))
(scratch / "cgroup").write_text("0::/stand-in\n")
os.environ |= {
    "SPACES_ZERO_GPU": "true",
    "ZEROGPU_PROC_SELF_CGROUP_PATH": str(scratch / "cgroup"),
    "ZEROGPU_OFFLOAD_DIR": str(scratch / "offload"),
    "ECODIFF_DEVICE": "cpu",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
}

import torch

from tests.zerogpu.not_bad_fork import not_bad_fork

torch.version.cuda = "12.8"
torch.cuda._is_in_bad_fork = not_bad_fork
torch._C._cuda_init = getattr(torch._C, "_cuda_init", lambda: None)

import spaces.zero.torch as zero_torch

zero_torch.unpatch = lambda: None  # the worker goes on taking itself for one
zero_torch.init = lambda uuid: None
zero_torch.move = lambda callback=None: None  # nothing was packed

from ecodiff import machine

machine.CHUNK_SECONDS = float(os.environ.get("CHUNK_SECONDS", machine.CHUNK_SECONDS))
import app

if __name__ == "__main__":
    app.launch(app.demo)
