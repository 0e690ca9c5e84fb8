"""The About tab."""

import gradio as gr

TEXT = """
### What it does
ecodiff removes attention heads and feed-forward neurons from a diffusion model's denoiser. It puts a
gate on every one of them, runs whole generations, and learns which gates can close while the final
latents stay what they were: no images, no retraining, prompts only. What is closed is then really cut
out, so the model has fewer parameters in memory and on disk.

The method is EcoDiff: Zhang et al., *Learnable Sparsity for Vision Generative Models*
([arXiv 2412.02852](https://arxiv.org/abs/2412.02852)), with hard-concrete gates (Louizos et al. 2018)
and time step gradient checkpointing. ecodiff starts the gates from a Gauss-Newton estimate of what
each one is worth, steers to a size that you choose, and lets the weights that stay take over from
those that went (a closed-form update of each layer, as in Optimal Brain Surgeon: no training).

### What it does not do
- The ratio is of the denoiser's parameters. Time saved is less than that: convolutions are not cut,
  and small widths do not use a GPU better.
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
