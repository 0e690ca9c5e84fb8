"""The About tab."""

import json
from pathlib import Path

import gradio as gr

from . import show

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fidelity.json"

TEXT = """
### What it does
ecodiff removes attention heads, feed-forward neurons and ResNet channels from a diffusion model's
denoiser. It puts a gate on every one of them, runs whole generations, and learns which gates can close
while the final latents stay what they were: no images, no retraining, prompts only. What is closed is
then really cut out, so the model has fewer parameters in memory and on disk.

The method is EcoDiff: Zhang et al., *Learnable Sparsity for Vision Generative Models*
([arXiv 2412.02852](https://arxiv.org/abs/2412.02852)), with hard-concrete gates (Louizos et al. 2018)
and time step gradient checkpointing. ecodiff starts the gates from a Gauss-Newton estimate of what
each one is worth, steers to a size that you choose, and lets the weights that stay take over from
those that went (a closed-form update of each layer, as in Optimal Brain Surgeon: no training).

### What it does not do
- The ratio is of the denoiser's parameters. Time saved is less than that: not
  all layers are cut, and small widths do not use a GPU better.
- Text encoders and the autoencoder are left as they are.
- Pruned models keep the base model's licence and its flaws.

### emoji-sdxl
A small Stable Diffusion XL trained on Microsoft's Fluent Emoji (MIT), which ships with ecodiff.

### Privacy
No account, no analytics. Runs are folders on this server, found by a random id that your browser
keeps.
"""


def build() -> None:
    """Lay out the tab."""
    gr.Markdown(TEXT)
    if BENCHMARK.is_file():  # in the repository and on a Space; a wheel comes without
        found = json.loads(BENCHMARK.read_text(encoding="utf-8"))
        gr.Markdown(
            f"### Measured\nError of the final latents on {found['pairs']} prompts that nothing was "
            "learned on, by the share of the denoiser's parameters removed; 0 is identical, 1 is "
            "unrelated. A + means compensated. Fast, balanced and paper are ecodiff's presets, ecodiff "
            f"is the method as published.\n\n{show.benchmark(found)}\n\n"
            f"`python benchmarks/fidelity.py`, {found['model']}, {found['machine']}.",
            elem_id="measured",
        )
