"""The Prune tab: choose, watch it learn, stop and resume, cut, download."""

import time

import gradio as gr
import pandas as pd

from .. import service
from ..errors import EcodiffError, RunError
from ..jobs import ACTIVE
from ..measure import megabytes
from . import show
from .common import MODELS, PRESETS, told

POLL_SECONDS = 0.7


def build(runs: gr.BrowserState, current: gr.BrowserState) -> dict[str, gr.components.Component]:
    """Lay out the tab. `runs` holds the ids that this browser knows, `current` the one shown."""
    gr.Markdown(
        "Pick a model and how much of it to remove. ecodiff learns which attention heads and neurons "
        "its images depend on, and cuts the rest out. **emoji-sdxl** works right away, here."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = gr.Dropdown(
                MODELS,
                value="emoji-sdxl",
                label="Model",
                info="Or type a diffusers folder or a Hub id",
                allow_custom_value=True,
            )
            ratio = gr.Slider(5, 60, value=20, step=1, label="Remove", info="% of the denoiser's parameters")
            preset = gr.Radio(PRESETS, value="fast", label="Learn for")
            with gr.Accordion("Advanced", open=False):
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
            start = gr.Button("Prune", variant="primary", size="lg")
        with gr.Column(scale=3, min_width=300):
            predicted = gr.HTML()
            with gr.Column(visible=False) as panel:
                status = gr.HTML()
                with gr.Row():
                    stop = gr.Button("Stop", interactive=False)
                    resume = gr.Button("Resume", interactive=False)
                with gr.Row(visible=False) as charts:
                    loss = gr.LinePlot(x="step", y="loss", title="Loss", height=220)
                    removed = gr.LinePlot(x="step", y="removed", title="% removed, expected", height=220)
    with gr.Column(visible=False) as results:
        gr.Markdown("### What is left\nMove the size: nothing is learned again.")
        size = gr.Slider(1, 66, value=20, step=1, label="Remove", info="% of the denoiser's parameters")
        figures = gr.HTML()
        layers = gr.HTML(label="Kept in each layer")
        compensate = gr.Checkbox(
            True, label="Compensate", info="What stays takes over from what went: closer images, same size"
        )
        with gr.Row():
            pack = gr.Button("Make the download", variant="primary")
            download = gr.DownloadButton("Download", interactive=False)
        packed = gr.Markdown()
        code = gr.Code(language="python", label="Load it", visible=False, interactive=False)

    watched = [panel, status, stop, resume, charts, loss, removed, results]
    cut_out = [figures, layers, download, packed, code]

    def predict(model, percent):
        try:
            return show.prediction(service.predict(model, percent / 100))
        except EcodiffError as error:
            return show.failure(str(error))

    @told
    def begin(model, percent, preset, seed, runs):
        made = service.start(model, percent / 100, preset, seed or 0)["run"]
        return [*(runs or []), made], made, percent

    def view(found):
        rows = [row for row in found["history"] if "loss" in row]
        table = pd.DataFrame(
            {
                "step": [row["step"] for row in rows],
                "loss": [row["loss"] for row in rows],
                "removed": [100 * row["expected"] for row in rows],
            }
        )
        active = found["stage"] in ACTIVE
        can_resume = found["stage"] in ("stopped", "failed", "interrupted")
        return (
            gr.update(visible=True),
            show.progress(found),
            gr.update(value="Stop", interactive=active),  # without a value its text is lost
            gr.update(
                value="Resume",
                interactive=can_resume,
                variant="primary" if can_resume else "secondary",
            ),
            gr.update(visible=len(rows) > 1),
            table,
            table,
            gr.update(visible=found["step"] > 0 and not active),
        )

    @told
    def watch(run):
        nothing = (gr.update(visible=False), *(gr.skip() for _ in watched[1:]))
        if not run:
            yield nothing
            return
        try:
            before = None
            while True:
                found = service.status(run)
                seen = (found["stage"], found["step"], round(found["seconds_left"] or 0))
                if seen != before:
                    yield view(found)
                    before = seen
                if found["stage"] not in ACTIVE:
                    return
                time.sleep(POLL_SECONDS)
        except RunError:
            yield nothing

    @told
    def recut(run, percent):
        if not run:
            return tuple(gr.skip() for _ in cut_out)
        facts = service.cut(run, percent / 100)
        return (
            show.size(facts),
            show.layers(facts["kept"]),
            gr.DownloadButton("Download", value=None, interactive=False),
            "",
            gr.Code(visible=False),
        )

    @told
    def make(run, percent, compensate):
        made = service.export(run, percent / 100, compensate)
        return (
            gr.DownloadButton(f"Download {made['name']}", value=made["path"], interactive=True),
            f"**{made['name']}** · {megabytes(made['bytes'])} · SHA-256 `{made['sha256']}`\n\n"
            "Unpack it, then:",
            gr.Code(show.snippet(made["folder"]), visible=True),
        )

    @told
    def end(run):
        service.stop(run)

    @told
    def go_on(run):
        service.resume(run)

    private = {"api_visibility": "private"}
    watching = private | {"concurrency_limit": None, "show_progress": "hidden"}
    for event in (model.change, ratio.release, ratio.change):
        event(predict, [model, ratio], predicted, show_progress="minimal", **private)
    begun = start.click(begin, [model, ratio, preset, seed, runs], [runs, current, size], **private)
    ended = begun.success(watch, current, watched, **watching)
    stop.click(end, current, None, queue=False, **private)
    resumed = resume.click(go_on, current, None, **private).success(watch, current, watched, **watching)
    for event in (ended, resumed):
        event.then(recut, [current, size], cut_out, show_progress="hidden", **private)
    size.release(recut, [current, size], cut_out, show_progress="hidden", **private)
    pack.click(make, [current, size, compensate], [download, packed, code], **private)
    return {
        "model": model,
        "ratio": ratio,
        "size": size,
        "predicted": predicted,
        "predict": predict,
        "watch": watch,
        "watched": watched,
        "recut": recut,
        "cut_out": cut_out,
    }
