"""Rank units by what you generate: your prompts, one a line, in a text file.

python examples/own_prompts.py prompts.txt
"""

import sys
from pathlib import Path

import ecodiff
from ecodiff import catalog

model = catalog.find("emoji-turbo")
lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
prompts = [line for line in lines if line.strip()]
heldout, learned = prompts[::8], [prompt for index, prompt in enumerate(prompts) if index % 8]

pipe = ecodiff.load(model.source)
scores = ecodiff.learn_masks(pipe, learned, model.learn_config("fast", ratio=0.2))
small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
ecodiff.compensate_(small, pipe, learned, model.compensation())
mean = ecodiff.compare(pipe, small, heldout, **model.drawing())["mean"]
print(f"latent error {mean['latent_error']:.5f} on {len(heldout)} of your prompts that were set aside")
