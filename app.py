"""The Space's entry, and `make app`."""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from ecodiff.logs import be_quiet
from ecodiff.ui import build_demo, launch

demo = build_demo()

if __name__ == "__main__":
    be_quiet()
    at_home = "SPACE_ID" not in os.environ and sys.stdout.isatty()
    launch(demo, inbrowser=at_home)
