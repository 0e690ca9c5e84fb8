"""The Prune tab: choose, watch it learn, stop and resume, cut, download."""

import time

import gradio as gr

from ...errors import EcodiffError
from .. import service
from . import predicted, run_panel, show, strip
from .common import (
    KINDS,
    MODELS,
    PRESETS,
    Browser,
    Tab,
    mine,
    percent_box,
    placed,
    secret,
    seed_box,
    told,
)
from .theme import scroll_to

TWICE_SECONDS = 3  # a second click within these is the first one's

GPUS = (8, 12, 16, 24, 48, 80)  # 10^9 bytes


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs, current = browser.runs, browser.current
    with gr.Column() as example:
        shown = gr.HTML()
        look = gr.Button("Open this result: move its size, draw your own prompts", size="sm", visible=False)
    gr.Markdown(
        "Pick a model and how much of it to remove. ecodiff learns which parts its images depend on, "
        "and cuts the rest out. **emoji-sdxl** works right away, here."
    )
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form = _form()
        with gr.Column(scale=3, min_width=300):
            prediction = gr.HTML()
            panel = run_panel.panel()
    results, turn = run_panel.results(), gr.State(0)

    named = form | panel | results | {"turn": turn, "example": example}
    watched = [*panel.values(), results["column"], results["size"], example]
    cut_out = [results[name] for name in run_panel.CUT]
    drawn = [results[name] for name in run_panel.DRAWN]
    size, compensate = results["size"], results["compensate"]
    boxes = ("model", "ratio", "preset", "seed", "kinds", "method", "prompts", "encoders")
    asked = [form[name] for name in boxes]

    private = {"api_visibility": "private"}
    hidden = private | {"show_progress": "hidden"}
    watching = hidden | {"concurrency_limit": None}
    what = _answer(form, prediction, [shown, look])
    begun = form["start"].click(begin, [*asked, runs], [runs, current, size], **private)
    begun.success(None, js=scroll_to("run"), **private)
    panel["stop"].click(run_panel.end, current, None, queue=False, **private)
    resumed = panel["resume"].click(run_panel.go_on, current, None, **private)
    cutting = placed(run_panel.recut, named)
    for event in (begun.success, resumed.success, turn.change):
        ended = event(placed(run_panel.drive, named), [current, turn], [*watched, turn], **watching)
        cut = ended.then(cutting, [current, size], cut_out, **hidden)
        done = cut.then(placed(run_panel.painted, named), [current, size], drawn, **watching)
        done.then(placed(run_panel.redrawn, named), [current, size], drawn, **hidden)
    changed = [size.change, compensate.change]
    gr.on(changed, cutting, [current, size], cut_out, trigger_mode="always_last", **hidden)
    results["paint"].click(placed(run_panel.paint, named), [current, size], drawn, **private)
    files = [results[name] for name in ("download", "packed", "code")]
    results["pack"].click(placed(run_panel.make, named), [current, size, compensate], files, **private)
    parts: dict = {"what": what, "predicted": prediction, "shown": [shown, look], "look": look}
    parts |= {name: results[name] for name in ("size", "compensate", "see")}
    parts |= {
        "watched": watched,
        "cut_out": cut_out,
        "drawn": drawn,
        "watch": placed(run_panel.watch, named),
        "recut": cutting,
        "painted": placed(run_panel.painted, named),
        "redrawn": placed(run_panel.redrawn, named),
    }
    return Tab(parts=parts)


def _answer(form: dict, prediction: gr.HTML, example: list) -> list:
    """What is in the boxes is answered: with what it would leave, and what is shown of the model.

    Returns what the prediction is made of.
    """
    private = {"api_visibility": "private"}
    hidden = private | {"show_progress": "hidden"}
    what = [form[name] for name in ("model", "ratio", "preset", "kinds", "gpu", "encoders")]
    # One event for all boxes: the answer to what is in them now comes last, and others are dropped.
    changes = [form[box].change for box in ("model", "ratio", "kinds", "gpu", "encoders")]
    gr.on(changes, predict, what, prediction, trigger_mode="always_last", **private)
    form["model"].change(shown_of, form["model"], example, **hidden)
    # What a person chooses for a model is not taken back by its own preset that comes late. That it was
    # chosen is noted by the browser at once: events wait for each other on their way to the server.
    best, chosen_for = gr.State(None), gr.Textbox(visible="hidden")
    form["preset"].input(None, form["model"], chosen_for, js="model => model", **private)
    looked_up = form["model"].change(preset_of, form["model"], best, **hidden)
    asked = [best, form["model"], chosen_for]
    looked_up.then(offered, asked, form["preset"], queue=False, **hidden)
    # The published method prunes heads and neurons only: what will be pruned is what is ticked.
    form["preset"].change(preset_kinds, form["preset"], form["kinds"], **hidden)
    return what


def _form() -> dict[str, gr.components.Component]:
    """What to prune, how much, how long to learn."""
    model = gr.Dropdown(
        MODELS,
        value="emoji-sdxl",
        label="Model",
        info="Or type a diffusers folder, a Hub id or link, or a .safetensors file",
        allow_custom_value=True,
    )
    _search(model)
    ratio = percent_box()
    gpu = gr.Dropdown(
        [("This machine", 0), *((f"A GPU of {size} GB", size) for size in GPUS)],
        value=0,
        label="To fit",
        info="Where the pruned model is to run",
    )
    preset = gr.Dropdown(
        PRESETS, value=service.default_preset("emoji-sdxl"), label="Preset", info="How its units are ranked"
    )
    with gr.Accordion("Advanced", open=False):
        kinds = gr.CheckboxGroup(
            KINDS,
            value=preset_kinds(preset.value),
            label="Units to prune",
            info="With directions the error is smaller; without, a small model is faster",
        )
        method = gr.Dropdown(
            [("As the preset says", ""), *service.methods()],
            value="",
            label="Ranking",
            info="Another published way to rank units, in one step",
        )
        encoders = gr.Slider(
            0,
            60,
            value=0,
            step=5,
            label="Text encoders: remove (%)",
            info="Of their parameters, besides those of the denoiser",
        )
        seed = seed_box()
        prompts = gr.Textbox(
            label="Your prompts",
            info="One a line, to learn and repair on in place of ecodiff's; a fifth is set aside to judge by",
            lines=3,
            max_lines=8,
        )
        upload = gr.UploadButton("From a text file", file_types=[".txt"], size="sm")
    upload.upload(own_prompts, upload, prompts, api_visibility="private")
    start = gr.Button("Prune", variant="primary", size="lg")
    if service.zerogpu():
        gr.Markdown("A large model? On a GPU of your own it learns without a quota:")
        gr.DuplicateButton("Duplicate this Space", size="sm")
    form = {"model": model, "ratio": ratio, "gpu": gpu, "preset": preset, "kinds": kinds, "method": method}
    return form | {"seed": seed, "prompts": prompts, "encoders": encoders, "start": start}


def _search(model: gr.Dropdown) -> None:
    """Where a model is looked for by words; the one that is chosen goes to the box above."""
    with gr.Accordion("Find a model", open=False):
        with gr.Row():
            words = gr.Textbox(
                label="Words", placeholder="sdxl lightning", max_length=96, scale=3, min_width=160
            )
            look = gr.Button("Search", scale=1, min_width=90)
        found = gr.Radio([], label="Found", visible=False)
        told_about = gr.Markdown()
        if service.offers_sign_in():
            gr.Markdown("Gated and private models are opened with your own rights:")
            gr.LoginButton(size="sm")
    private = {"api_visibility": "private"}
    gr.on([look.click, words.submit], find, words, [found, told_about], **private)
    found.input(lambda name: name, found, model, show_progress="hidden", **private)


@told
def find(words):
    """Models that match, to choose one of."""
    answer = service.find_models(words)
    choices = [(entry["title"], entry["name"]) for entry in answer["catalogue"]]
    for row in answer["hub"]:
        about = f"{row['downloads']:,} downloads · {row['licence']}{' · gated' if row['gated'] else ''}"
        choices.append((f"{row['id']} · {about}", row["id"]))
    notes = [answer["error"]] if answer["error"] else []
    notes += [] if choices else ["No model that ecodiff can prune matches these words."]
    gated = [row for row in answer["hub"] if row["gated"]]
    links = ", ".join(f"[{row['id']}]({row['url']})" for row in gated)
    notes += [f"Gated: accept the licence first, on {links}."] if gated else []
    return gr.Radio(choices, value=None, visible=bool(choices)), "\n\n".join(notes)


def preset_kinds(preset):
    """The kinds of units that a preset prunes."""
    return list(service.kinds_of(preset))


def preset_of(model):
    """The preset that a model is best learned with; None if it cannot be looked at."""
    try:
        return service.default_preset(model)
    except EcodiffError:
        return None


def offered(best, model, chosen_for):
    """The best preset, unless one was chosen for this model."""
    return best if best and model != chosen_for else gr.skip()


def shown_of(model):
    """What pruning does to a model's images, if that ships with it."""
    found = service.example(model)
    if not found:
        return "", gr.Button(visible=False)
    title = (
        f'<p class="eco-lead">What it does to <b>{model}</b>: prompts that nothing was learned on, each from '
        "the same noise.</p>"
    )
    return strip.cards(found["pictures"], (0.2, 0.4, 0.6), title), gr.Button(visible=True)


def predict(model, percent, preset, kinds, gpu, encoders, token: gr.OAuthToken | None = None):
    """What a size will leave, or why it cannot be."""
    asked = {"preset": preset, "kinds": kinds, "gpu": gpu or None, "text_encoders": encoders / 100}
    try:
        facts = service.predict(model, percent / 100, **asked, token=secret(token))
        return predicted.prediction(facts, encoders / 100)
    except EcodiffError as error:
        return show.failure(str(error))


@told
def example_run(model):
    """The run that ships with a model, to be shown as one of the Library is."""
    return [service.example(model)["run"], time.time()]


@told
def turn_to(opened):
    """A run of the Library, on the Prune tab, at the size that it was learned for."""
    run = opened[0]
    status = service.status(run)
    return gr.Tabs(selected="prune"), run, round(100 * (status["size"] or status["ratio"]))


@told
def own_prompts(file):
    """The prompts in a text file, for the box."""
    return "\n".join(service.read_prompts(file))


@told
def begin(
    model, percent, preset, seed, kinds, method, prompts, encoders, runs, token: gr.OAuthToken | None = None
):
    """Start a run and remember its id in the browser."""
    if not kinds:
        raise gr.Error("Choose units to prune, under Advanced.", duration=8)
    own = (prompts or "").strip().splitlines() or None
    newest = next(iter(mine(runs)), None)
    if newest and newest["stage"] in service.ACTIVE and time.time() - newest["created"] < TWICE_SECONDS:
        return runs, newest["run"], percent
    asked = (model, percent / 100, method or preset, seed, kinds, own, secret(token))
    made = service.start(*asked, encoders / 100)["run"]
    return [*(runs or []), made], made, percent
