"""The Sizes tab: held-out prompts at several sizes, those that suffer most first."""

import gradio as gr
import pandas as pd
from PIL import Image, ImageDraw

from .. import service
from . import show
from .common import Browser, Tab, choose, lenient, placed, told

TILE, LABEL = 128, 18  # pixels

PLOT = {"x": "removed", "y": "psnr", "x_title": "% removed", "y_title": "PSNR, dB"}


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs, current = browser.runs, browser.current
    gr.Markdown(
        "How small can it be? Prompts that nothing was learned on are drawn at several sizes, each from "
        "the same noise as the dense model's image, and measured."
    )
    empty = gr.Markdown("Nothing to draw yet: prune a model first, in the **Prune** tab.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            run = gr.Dropdown([], label="Pruned model", info="Your runs, newest first")
            ratios = gr.CheckboxGroup(
                [(f"−{percent} %", percent) for percent in (5, 10, 15, 20, 30, 40, 50, 60)],
                value=[10, 20, 30, 40],
                label="Sizes",
                info=f"Up to {service.MAX_SIZES}: % of the denoiser's parameters removed",
            )
            count = lenient(gr.Slider(1, service.MAX_PROMPTS, value=6, step=1, label="Prompts"))
            compensate = gr.Checkbox(True, label="Repair weights")
            with gr.Row():
                draw = gr.Button("Draw them", variant="primary", size="lg", interactive=False)
                stop = gr.Button("Stop", size="lg")
        with gr.Column(scale=3, min_width=300):
            figures = gr.HTML()
            plot = gr.LinePlot(**PLOT, title="Closeness to the dense model", height=240, visible=False)
    gallery = gr.Gallery(
        label="Worst first",
        show_label=False,
        columns=1,
        height="auto",
        format="png",
        interactive=False,
        object_fit="contain",
        elem_id="strips",
        visible=False,
    )
    private = {"api_visibility": "private"}
    asked = [run, ratios, count, compensate]
    named = {"figures": figures, "plot": plot, "gallery": gallery, "run": run, "empty": empty, "draw": draw}
    found = [figures, plot, gallery]
    drawing = draw.click(placed(survey, named), asked, found, show_progress="minimal", **private)
    stop.click(None, cancels=drawing, **private)

    return Tab(placed(choose, named), [runs, current, run], [run, empty, draw])


@told
def survey(run, percents, count, compensate):
    """Draw prompt after prompt; what is there so far is shown, worst first."""
    if not run:
        raise gr.Error("Prune a model first, in the Prune tab.", duration=8)
    drawn = []
    hidden = gr.update(visible=False)
    yield {"figures": show.surveyed([], count), "plot": hidden, "gallery": hidden}
    for samples, row in service.sizes(run, [percent / 100 for percent in percents], count, compensate):
        drawn.append((row["latent_error"][-1], strip([s.image for s in samples], row["ratios"]), row))
        drawn.sort(key=lambda entry: -entry[0])
        means = service.means([row for _, _, row in drawn])
        table = pd.DataFrame(
            {"removed": [100 * m["ratio"] for m in means], "psnr": [m["psnr"] for m in means]}
        )
        images = [(image, f"{row['prompt']} · seed {row['seed']}") for _, image, row in drawn]
        yield {
            "figures": show.surveyed(means, count, len(drawn)),
            "plot": gr.update(value=table, visible=len(means) > 1),
            "gallery": gr.update(value=images, visible=True),
        }


def strip(images: list[Image.Image], ratios: list[float]) -> Image.Image:
    """The dense image and those of each size, side by side under their names."""
    tiles = [image.convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC) for image in images]
    page = Image.new("RGB", (TILE * len(tiles), TILE + LABEL), "white")
    pen = ImageDraw.Draw(page)
    for column, (tile, name) in enumerate(zip(tiles, ["dense", *(f"-{r:.0%}" for r in ratios)], strict=True)):
        page.paste(tile, (TILE * column, LABEL))
        pen.text((TILE * column + TILE // 2, LABEL // 2), name, fill="#334155", anchor="mm")
    return page
