"""The Space's entry, and `make app`."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from ecodiff.ui import build_demo, launch

demo = build_demo()

if __name__ == "__main__":
    launch(demo)
