"""The Space's entry, and `make app`."""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# ZeroGPU deletes downloads whose weights it has packed; other models are loaded later on.
os.environ.setdefault("ZEROGPU_MMAP_AUTOPRUNE_PATTERN", "/nonexistent/*")

import spaces  # noqa: F401 - before torch, or ZeroGPU refuses to start
import torch

from ecodiff import machine
from ecodiff.app.ui import build_demo, launch
from ecodiff.machine import be_quiet

if machine.zerogpu():
    torch.set_num_threads(1)  # workers are forked from this process: a pool of threads would not be there

demo = build_demo()

if __name__ == "__main__":
    be_quiet()
    at_home = "SPACE_ID" not in os.environ and sys.stdout.isatty()
    launch(demo, inbrowser=at_home)
