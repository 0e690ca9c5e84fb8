"""The Prune tab: choose, watch it learn, stop and resume, cut, download."""

import time

import gradio as gr
import pandas as pd

from ...errors import EcodiffError, RunError
from ...units import PRESET_KINDS
from .. import service
from . import show
from .common import (
    COMPENSATE,
    KINDS,
    MODELS,
    PRESETS,
    Browser,
    Tab,
    percent_box,
    placed,
    readable,
    seed_box,
    told,
)

POLL_SECONDS = 0.7


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs, current = browser.runs, browser.current
    gr.Markdown(
        "Pick a model and how much of it to remove. ecodiff learns which parts its images depend on, "
        "and cuts the rest out. **emoji-sdxl** works right away, here."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form()
        with gr.Column(scale=3, min_width=300):
            predicted = gr.HTML()
            panel = _panel()
    results = _results()

    turn = gr.State(0)
    named = form | panel | results | {"turn": turn}
    watched = [*panel.values(), results["column"]]
    cut_out = [results[name] for name in ("figures", "layers", "download", "packed", "code")]
    size, compensate = results["size"], results["compensate"]
    asked = [form[name] for name in ("model", "ratio", "preset", "seed", "kinds", "method", "prompts")]

    private = {"api_visibility": "private"}
    hidden = private | {"show_progress": "hidden"}
    watching = hidden | {"concurrency_limit": None}
    what = [form[name] for name in ("model", "ratio", "preset", "kinds")]
    for event in (form["model"].change, form["ratio"].release, form["ratio"].change, form["kinds"].change):
        event(predict, what, predicted, show_progress="minimal", **private)
    form["model"].change(preset_of, form["model"], form["preset"], **hidden)
    # The published method prunes heads and neurons only: what will be pruned is what is ticked.
    form["preset"].change(preset_kinds, form["preset"], form["kinds"], **hidden)
    begun = form["start"].click(begin, [*asked, runs], [runs, current, size], **private)
    panel["stop"].click(end, current, None, queue=False, **private)
    resumed = panel["resume"].click(go_on, current, None, **private)
    cutting = placed(recut, named)
    for event in (begun.success, resumed.success, turn.change):
        ended = event(placed(drive, named), [current, turn], [*watched, turn], **watching)
        ended.then(cutting, [current, size], cut_out, **hidden)
    size.release(cutting, [current, size], cut_out, **hidden)
    compensate.change(cutting, [current, size], cut_out, **hidden)
    files = [results[name] for name in ("download", "packed", "code")]
    results["pack"].click(placed(make, named), [current, size, compensate], files, **private)
    parts: dict = {"what": what, "predicted": predicted}
    parts |= {name: results[name] for name in ("size", "compensate", "see")}
    parts |= {"watched": watched, "cut_out": cut_out, "watch": placed(watch, named), "recut": cutting}
    return Tab(parts=parts)


def _form() -> dict[str, gr.components.Component]:
    """What to prune, how much, how long to learn."""
    model = gr.Dropdown(
        MODELS,
        value="emoji-sdxl",
        label="Model",
        info="Or type a diffusers folder, a Hub id or a .safetensors file",
        allow_custom_value=True,
    )
    ratio = percent_box()
    preset = gr.Radio(PRESETS, value="fast", label="Learn for")
    with gr.Accordion("Advanced", open=False):
        kinds = gr.CheckboxGroup(KINDS, value=list(PRESET_KINDS), label="Units to prune")
        method = gr.Dropdown(
            [("As the preset says", ""), *service.methods()],
            value="",
            label="Ranking",
            info="Another published way to rank units, in one step",
        )
        seed = seed_box()
        prompts = gr.Textbox(
            label="Your prompts",
            info="One a line, to learn and repair on in place of ecodiff's; a fifth is set aside to judge by",
            lines=3,
            max_lines=8,
        )
        upload = gr.UploadButton("Take them from a text file", file_types=[".txt"], size="sm")
    upload.upload(own_prompts, upload, prompts, api_visibility="private")
    start = gr.Button("Prune", variant="primary", size="lg")
    if service.zerogpu():
        gr.Markdown("A large model? On a GPU of your own it learns without a quota:")
        gr.DuplicateButton("Duplicate this Space", size="sm")
    form = {"model": model, "ratio": ratio, "preset": preset, "kinds": kinds, "method": method}
    return form | {"seed": seed, "prompts": prompts, "start": start}


def _panel() -> dict[str, gr.components.Component]:
    """The run that is watched: in the order of what `view` returns."""
    with gr.Column(visible=False) as panel:
        status = gr.HTML()
        with gr.Row():
            stop = gr.Button("Stop", interactive=False)
            resume = gr.Button("Resume", interactive=False)
        with gr.Row(visible=False) as charts:
            loss = gr.LinePlot(x="step", y="loss", title="Loss", height=220)
            removed = gr.LinePlot(x="step", y="removed", title="% removed, expected", height=220)
    return {
        "panel": panel,
        "status": status,
        "stop": stop,
        "resume": resume,
        "charts": charts,
        "loss": loss,
        "removed": removed,
    }


def _results() -> dict[str, gr.components.Component]:
    """What was cut, at a size that can be moved, and the download."""
    with gr.Column(visible=False) as column:
        gr.Markdown("## What is left\nMove the size: nothing is learned again.")
        size = percent_box()
        figures = gr.HTML()
        layers = gr.HTML(label="Kept in each layer")
        compensate = gr.Checkbox(True, label="Compensate", info=COMPENSATE)
        with gr.Row():
            see = gr.Button("Compare images", variant="primary")
            pack = gr.Button("Make the download")
            download = gr.DownloadButton("Download", interactive=False)
        packed = gr.Markdown()
        code = gr.Code(language="python", label="Load it", visible=False, interactive=False)
    return {
        "column": column,
        "size": size,
        "figures": figures,
        "layers": layers,
        "compensate": compensate,
        "see": see,
        "pack": pack,
        "download": download,
        "packed": packed,
        "code": code,
    }


def preset_kinds(preset):
    """The kinds of units that a preset prunes."""
    return list(service.kinds_of(preset))


def preset_of(model):
    """The preset that a model is best learned with; what cannot be looked at changes nothing."""
    try:
        return service.default_preset(model)
    except EcodiffError:
        return gr.skip()


def predict(model, percent, preset, kinds):
    """What a size will leave, or why it cannot be."""
    try:
        return show.prediction(service.predict(model, percent / 100, preset, kinds))
    except EcodiffError as error:
        return show.failure(str(error))


@told
def own_prompts(file):
    """The prompts in a text file, for the box."""
    return "\n".join(service.read_prompts(file))


@told
def begin(model, percent, preset, seed, kinds, method, prompts, runs):
    """Start a run and remember its id in the browser."""
    if not kinds:
        raise gr.Error("Choose units to prune, under Advanced.", duration=8)
    own = prompts.splitlines() if prompts.strip() else None
    made = service.start(model, percent / 100, method or preset, seed, kinds, own)["run"]
    return [*(runs or []), made], made, percent


def view(found):
    """A run's status as updates of the panel and the results."""
    rows = [row for row in found["history"] if "loss" in row]
    table = pd.DataFrame(
        {
            "step": [row["step"] for row in rows],
            "loss": [row["loss"] for row in rows],
            "removed": [100 * row["expected"] for row in rows],
        }
    )
    active = found["stage"] in service.ACTIVE
    can_resume = found["stage"] in ("stopped", "failed", "interrupted")
    resume = {"interactive": can_resume, "variant": "primary" if can_resume else "secondary"}
    return {
        "panel": gr.update(visible=True),
        "status": show.progress(found),
        "stop": gr.update(value="Stop", interactive=active),  # without a value its text is lost
        "resume": gr.update(value="Resume", **resume),
        "charts": gr.update(visible=len(rows) > 1),
        "loss": table,
        "removed": table,
        "column": gr.update(visible=found["step"] > 0 and not active),
    }


@told
def watch(run):
    """Updates of the panel for as long as the run goes on."""
    nothing = {"panel": gr.update(visible=False)}
    if not run:
        yield nothing
        return
    try:
        before = None
        while True:
            found = service.status(run)
            done = round(100 * (found["share"] or 0))
            seen = (found["stage"], found["step"], round(found["seconds_left"] or 0), done)
            if seen != before:
                yield view(found)
                before = seen
            if found["stage"] not in service.ACTIVE:
                return
            time.sleep(POLL_SECONDS)
    except RunError:
        yield nothing


@told
def drive(run, turn):
    """See the run through. On ZeroGPU it learns in calls of a minute, each an event of its own.

    An event that ends while there is more to do changes `turn`, which starts the next one.
    """
    if not service.zerogpu():
        yield from watch(run)
        return
    before = service.status(run)["step"]
    try:
        for found in service.learn(run):
            yield view(found)
    except gr.Error as error:  # of ZeroGPU: the call was ended, or there is no quota
        found, why = service.status(run), readable(error).message
        if "aborted" not in why or found["step"] == before:
            yield view(service.fail(run, why))
            return
    if found["stage"] in ("interrupted", "calibrating"):
        stage = "learning" if found["stage"] == "interrupted" else "calibrating"
        yield view(found | {"stage": stage}) | {"turn": turn + 1}


@told
def recut(run, percent):
    """What is left at another size; a download that was made is of the size before."""
    if not run:
        return {"packed": gr.skip()}  # Gradio takes an empty dict for a value
    facts = service.cut(run, percent / 100)
    return {
        "figures": show.size(facts),
        "layers": show.layers(facts["kept"], facts["kinds"]),
        "download": gr.DownloadButton("Download", value=None, interactive=False),
        "packed": "",
        "code": gr.Code(visible=False),
    }


@told
def make(run, percent, compensate):
    """The pruned folder as a file."""
    made = service.export(run, percent / 100, compensate)
    about = f"**{made['name']}** · {service.megabytes(made['bytes'])} · SHA-256 `{made['sha256']}`"
    return {
        "download": gr.DownloadButton(f"Download {made['name']}", value=made["path"], interactive=True),
        "packed": f"{about}\n\nUnpack it, then:",
        "code": gr.Code(made["code"], visible=True),
    }


@told
def end(run):
    """Ask the run to stop."""
    service.stop(run)


@told
def go_on(run):
    """Go on with a run that was stopped."""
    service.resume(run)
