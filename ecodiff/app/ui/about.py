"""The About tab."""

import gradio as gr

from ... import catalog
from . import show
from .common import Browser, Tab

TEXT = """
## What it does
ecodiff removes what a diffusion model's images depend on least from its denoiser: attention heads,
feed-forward neurons, ResNet channels, and directions inside heads and modulation layers. It runs whole
generations to find out, from prompts alone; images are not needed, and nothing is retrained. What is not
needed is really cut out, so the model has fewer parameters in memory and on disk.

The method is EcoDiff: Zhang et al., *Learnable Sparsity for Vision Generative Models*
([arXiv 2412.02852](https://arxiv.org/abs/2412.02852)), with hard-concrete gates (Louizos et al. 2018)
and time step gradient checkpointing. The presets Fast, Balanced, Paper and EcoDiff learn with it. The
preset Surgeon ranks all units in one step instead, by what the final latents lose once the weights that stay
have taken over (Optimal Brain Surgeon), Thorough does so on four times the trajectories; they measured best
at most sizes of the models that ship. Whatever ranks them, the weights that stay can take over from those
that went: a closed-form update of each layer.

## What it does not do
- The ratio is of the denoiser's parameters. Time saved is less than that: not
  all layers are cut, and small widths do not use a GPU better.
- The autoencoder is left as it is, and text encoders too unless you ask for less of them.
- Pruned models keep the base model's licence and its flaws.

## What ships with it
emoji-sdxl, a small Stable Diffusion XL; emoji-turbo, the same distilled to four steps; emoji-flux, a
small FLUX.1. All are trained on Microsoft's Fluent Emoji (MIT).

## Privacy
No account, no analytics. Runs are folders on this server, found by a random id that your browser
keeps.
"""


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    gr.Markdown(TEXT)
    gr.Markdown(f"## Architectures\n{_supported()}")
    for found in catalog.MEASURED:
        name = found["model"]
        with gr.Accordion(f"Measured on {name}", open=name == "emoji-sdxl"):
            _measured(found)
    return Tab()


def _measured(found: dict) -> None:
    medians = any("latent_error_median" in row for row in found["rows"])
    gr.Markdown(
        f"Error of the final latents on {found['pairs']} prompts that nothing was learned on, by the "
        "share of the denoiser's parameters removed; 0 is identical, 1 is unrelated. A + means "
        "compensated. Surgeon, gauss-newton, fast, balanced and paper are ecodiff's own, ecodiff is the "
        "method as published."
        + " In brackets the median: in a mean, one trajectory that turns off into another image weighs "
        "as much as all others." * medians
    )
    gr.HTML(show.table(show.measured(found), f"Measured on {found['model']}"))
    command = f"python benchmarks/fidelity.py --model {found['model']} --pairs {found['pairs']}"
    gr.Markdown(f"`{command}`, {found['machine']}.")


def _supported() -> str:
    """What passes the conformance suite, in one paragraph for each depth."""
    whole = [row["name"] for row in catalog.SUPPORTED if row["pipeline"]]
    alone = [row["name"] for row in catalog.SUPPORTED if not row["pipeline"]]
    return (
        f"Every check passes through the whole pipeline: {', '.join(whole)}.\n\n"
        f"Every check passes on the denoiser, in a loop of its own: {', '.join(alone)}.\n\n"
        "Others work as far as their layers are known; what is not known is left alone."
    )
