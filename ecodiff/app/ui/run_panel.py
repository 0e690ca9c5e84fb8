"""The run that is shown on the Prune tab: where it is, its pictures, its sizes, its checkpoint."""

import time

import gradio as gr
import pandas as pd

from ...errors import EcodiffError, RunError
from .. import service
from . import show, strip
from .common import COMPENSATE, label, percent_box, readable, secret, told

POLL_SECONDS = 0.7
CUT = ("figures", "layers", "download", "packed", "code", "pictures", "curve", "paint")  # by size
DRAWN = ("pictures", "curve", "paint")


def panel() -> dict[str, gr.components.Component]:
    """The run that is watched: in the order of what `view` returns."""
    with gr.Column(visible=False, elem_id="run") as panel:
        status, sketch = gr.HTML(), gr.HTML()
        with gr.Row():
            stop = gr.Button("Stop", interactive=False)
            resume = gr.Button("Resume", interactive=False)
        with gr.Accordion("Learning curves", open=False, visible=False) as charts, gr.Row():
            loss = gr.LinePlot(x="step", y="loss", title="Loss", height=220)
            removed = gr.LinePlot(x="step", y="removed", title="% removed, expected", height=220)
    return {
        "panel": panel,
        "status": status,
        "sketch": sketch,
        "stop": stop,
        "resume": resume,
        "charts": charts,
        "loss": loss,
        "removed": removed,
    }


def results() -> dict[str, gr.components.Component]:
    """What was cut, at a size that can be moved, and the download."""
    with gr.Column(visible=False) as column:
        gr.Markdown("## The result")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                size = percent_box("size")  # which a point of the curve sets
                gr.Markdown("Move the size: nothing is learned again.")
                curve = gr.HTML()
                paint = gr.Button("Draw this size", visible=False)
            with gr.Column(scale=3, min_width=300):
                pictures = gr.HTML()
        figures = gr.HTML()
        layers = gr.HTML(label="Kept in each layer")
        compensate = gr.Checkbox(True, label="Repair weights", info=COMPENSATE)
        with gr.Row():
            see = gr.Button("Compare with my prompt", variant="primary")
            pack = gr.Button("Build checkpoint")
            download = gr.DownloadButton("Download", interactive=False)
        packed = gr.Markdown()
        code = gr.Code(language="python", label="Load it", visible=False, interactive=False)
    return {
        "column": column,
        "size": size,
        "pictures": pictures,
        "curve": curve,
        "paint": paint,
        "figures": figures,
        "layers": layers,
        "compensate": compensate,
        "see": see,
        "pack": pack,
        "download": download,
        "packed": packed,
        "code": code,
    }


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
    drawn = service.pictures(found["run"]) if active else {}
    sketch = strip.strip(drawn, [found["ratio"]], found["steps"])
    return {
        "panel": gr.update(visible=True),
        "example": gr.update(visible=False),
        "status": show.heading(label(found), found) + show.progress(found),
        "sketch": sketch,
        "stop": gr.update(
            value="Stop", interactive=active, visible=active
        ),  # without a value its text is lost
        "resume": gr.update(value="Resume", visible=can_resume, **resume),
        "charts": gr.update(visible=len(rows) > 1),
        "loss": table,
        "removed": table,
        "column": gr.update(visible=found["step"] > 0 and not active),
    }


def _own_size(found):
    """The size that a run was learned for; that of a run made of a plan cannot be moved."""
    if found["size"] is not None:
        return gr.update(value=round(100 * found["size"]), interactive=False)
    return gr.update(value=round(100 * found["ratio"]), interactive=True)


@told
def watch(run):
    """Updates of the panel for as long as the run goes on."""
    nothing = {"panel": gr.update(visible=False), "example": gr.update(visible=True)}
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
                yield view(found) | ({} if before else {"size": _own_size(found)})
                before = seen
            if found["stage"] not in service.ACTIVE:
                return
            time.sleep(POLL_SECONDS)
    except RunError:
        yield nothing


@told
def drive(run, turn, token: gr.OAuthToken | None = None):
    """See the run through. On ZeroGPU it learns in calls of a minute, each an event of its own.

    An event that ends while there is more to do changes `turn`, which starts the next one.
    """
    if not service.zerogpu():
        yield from watch(run)
        return
    before = service.status(run)["step"]
    try:
        for found in service.learn(run, secret(token)):
            yield view(found)
    except (gr.Error, EcodiffError) as error:  # ZeroGPU ended the call, or there is no quota, or it failed
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
    if not run or not service.status(run)["step"]:  # nothing is learned yet
        return {"packed": gr.skip()}  # Gradio takes an empty dict for a value
    facts = service.cut(run, percent / 100)
    return _pictures(run, percent) | {
        "figures": show.size(facts),
        "layers": show.layers(facts["kept"], facts["kinds"]),
        "download": gr.DownloadButton("Download", value=None, interactive=False),
        "packed": "",
        "code": gr.Code(visible=False),
    }


def _pictures(run, percent):
    """What was drawn of a run, at a size; a button where it was not."""
    found, ratio = service.pictures(run), percent / 100
    there = strip.drawn(found, ratio)
    return {
        "pictures": strip.strip(found, [ratio]) if there else strip.missing(found, ratio),
        "curve": strip.curve(found, ratio),
        "paint": gr.update(visible=not there and not service.status(run)["drawing"]),
    }


@told
def painted(run, percent):
    """The pictures of a run that has just been finished, as they are drawn.

    The strip is shown once: whoever moves the size meanwhile keeps what is shown then.
    """
    count = 0
    while run and service.status(run)["drawing"]:
        found = service.pictures(run)
        if len(found.get("sizes", [])) > count:
            shown = _pictures(run, percent) if not count else {"curve": strip.curve(found)}
            count = len(found["sizes"])
            yield shown
        time.sleep(POLL_SECONDS)
    yield {"curve": gr.skip()}


@told
def redrawn(run, percent):
    """All that was drawn, at the size that is shown by now."""
    if not run or not service.status(run)["step"]:
        return {"curve": gr.skip()}
    return _pictures(run, percent)


@told
def paint(run, percent):
    """Draw the run's prompts at this size."""
    service.draw_pictures(run, percent / 100)
    return _pictures(run, percent)


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
def go_on(run, token: gr.OAuthToken | None = None):
    """Go on with a run that was stopped."""
    service.resume(run, secret(token))
