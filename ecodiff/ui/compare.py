"""The Compare tab: one prompt, one noise, dense and pruned."""

import gradio as gr
from PIL import Image

from .. import catalog, service
from . import show
from .common import choices, told

EXAMPLES = ["red apple", "woman artist, medium skin tone", "cat face", "rocket", "france flag"]


def for_the_eye(image: Image.Image) -> Image.Image:
    """Small images are shown larger; what the API returns keeps its size."""
    factor = max(1, 448 // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)


def build(runs: gr.BrowserState, current: gr.BrowserState) -> dict[str, gr.components.Component]:
    """Lay out the tab."""
    empty = gr.Markdown("Nothing to compare yet: prune a model first, in the **Prune** tab.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            run = gr.Dropdown([], label="Pruned model", info="Your runs, newest first")
            ratio = gr.Slider(1, 90, value=20, step=1, label="Remove", info="% of the denoiser's parameters")
            prompt = gr.Textbox("red apple", label="Prompt", max_length=400)
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            compensate = gr.Checkbox(
                True,
                label="Compensate",
                info="What stays takes over from what went: closer images, same size",
            )
            known = catalog.MODELS["emoji-sdxl"]
            with gr.Accordion("Advanced", open=False):
                steps = gr.Slider(1, 100, value=known.steps, step=1, label="Time steps")
                guidance = gr.Slider(0, 15, value=known.guidance_scale, step=0.5, label="Guidance scale")
            draw = gr.Button("Draw both", variant="primary", size="lg")
            gr.Examples(EXAMPLES, prompt, label="Try")
        with gr.Column(scale=3, min_width=300):
            slider = gr.ImageSlider(label="Dense ◂ ▸ pruned", format="png", max_height=460, interactive=False)
            figures = gr.HTML()
    history = gr.Gallery(
        label="This session: dense, pruned, dense, pruned, …",
        columns=8,
        height="auto",
        elem_id="history",
        format="png",
        interactive=False,
        object_fit="contain",
        visible=False,
    )

    draw.click(
        compare,
        [run, ratio, prompt, seed, steps, guidance, compensate, history],
        [slider, figures, history],
        api_visibility="private",
    )

    run.change(told(defaults), run, [steps, guidance], api_visibility="private", show_progress="hidden")

    return {"refresh": refresh, "inputs": [runs, current, run], "outputs": [run, empty]}


@told
def compare(run, percent, prompt, seed, steps, guidance, compensate, history):
    """Draw both and measure."""
    if not run:
        raise gr.Error("Prune a model first, in the Prune tab.", duration=8)
    asked = (run, percent / 100, prompt, seed or 0, steps, guidance, compensate)
    dense, pruned, facts = service.compare(*asked)
    pair = tuple(for_the_eye(sample.image) for sample in (dense, pruned))
    title = f"{prompt} · seed {seed or 0}"
    shown = [(pair[0], f"{title} · dense"), (pair[1], f"{title} · −{percent} %")]
    return pair, show.comparison(facts), gr.update(value=shown + (history or [])[:22], visible=True)


def defaults(run):
    """Time steps and guidance of the run's model: a distilled model draws in few steps, without it."""
    if not run:
        return gr.skip(), gr.skip()
    known = catalog.find(service.status(run)["model"])
    return known.steps, known.guidance_scale or 0


def refresh(runs, current, chosen):
    """Runs to choose from: what was chosen, else what was pruned last."""
    found = choices(runs, scored=True)
    ids = [value for _, value in found]
    value = chosen if chosen in ids else current if current in ids else (ids or [None])[0]
    return gr.Dropdown(found, value=value), gr.Markdown(visible=not found)
