"""The Compare tab: one prompt, one noise, dense and pruned; a link gives the comparison to others."""

import re
from math import isfinite
from urllib.parse import urlencode

import gradio as gr
from gradio import utils
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from ... import catalog
from .. import service
from . import show
from .common import (
    COMPENSATE,
    Browser,
    Tab,
    choices,
    choose,
    lenient,
    lock_size,
    percent_box,
    placed,
    seed_box,
    told,
)
from .theme import scroll_to

# The clipboard is there on https and on this machine only; on plain http a selection is copied.
COPY = """() => {
  const link = document.querySelector('#figures a').href;
  if (navigator.clipboard) return navigator.clipboard.writeText(link).then(() => []);
  const box = Object.assign(document.createElement('textarea'), {value: link});
  document.body.append(box); box.select(); document.execCommand('copy'); box.remove();
  return [];
}"""

SETTINGS = ("run", "ratio", "prompt", "seed", "steps", "guidance", "compensate")

QUERY = ("run", "size", "prompt", "seed", "steps", "guidance", "compensate")  # of a link

KEPT = 24  # images of the gallery

EXAMPLES = ["red apple", "woman artist, medium skin tone", "cat face", "rocket", "france flag"]


def for_the_eye(image: Image.Image) -> Image.Image:
    """Small images are shown larger; what the API returns keeps its size."""
    factor = max(1, 448 // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    empty = gr.Markdown("Nothing to compare yet: prune a model first, in the **Prune** tab.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            form, draw, stop, another = _form()
        with gr.Column(scale=3, min_width=300):
            slider = gr.ImageSlider(
                label="Dense ◂ ▸ pruned", format="png", max_height=460, interactive=False, elem_id="pair"
            )
            figures = gr.HTML(elem_id="figures")
            copy = gr.Button("Copy the link", size="sm", visible=False)
    back = gr.Button("Use this image's settings", size="sm", visible=False)
    history = gr.Gallery(
        label="Drawn in this session: dense, pruned, dense, pruned, …",
        show_label=False,
        columns=8,
        height="auto",
        elem_id="history",
        format="png",
        interactive=False,
        object_fit="contain",
        visible=False,
    )
    drawn_with = gr.State([])  # settings of each image of the gallery
    drawn = {"slider": slider, "figures": figures, "history": history, "copy": copy, "drawn_with": drawn_with}
    settings = list(form.values())
    parts = _wire(browser, form, empty, draw)
    asked, outputs, private = (
        [*settings, history, drawn_with],
        [*drawn.values()],
        {"api_visibility": "private"},
    )
    shown = private | {"show_progress": "minimal", "show_progress_on": figures}
    drawing = gr.on([draw.click, form["prompt"].submit], placed(compare, drawn), asked, outputs, **shown)
    draw.click(None, js=scroll_to("pair"), **private)
    followed = parts["linked"].change(placed(linked_to, drawn), [parts["linked"], *asked], outputs, **shown)
    stop.click(lambda: "", None, figures, cancels=[drawing, followed], **private)
    another.click(None, None, form["seed"], js="() => Math.floor(Math.random() * 2**31)", **private)
    copy.click(None, js=COPY, **private)
    picked, hidden = gr.State(-1), private | {"show_progress": "hidden"}
    history.select(pick, None, [picked, back], **hidden)
    back.click(placed(send_back, form), [drawn_with, picked], settings, **hidden)
    outputs = [form["run"], empty, draw, form["steps"], form["guidance"]]
    inputs = [browser.runs, browser.current, form["run"]]
    return Tab(placed(refresh, parts["named"]), inputs, outputs, parts)


def _form() -> tuple[dict[str, gr.components.Component], gr.Button, gr.Button, gr.Button]:
    """What is drawn, in the order of SETTINGS; the buttons that draw, stop, and take another seed."""
    run = gr.Dropdown([], label="Pruned model", info="Your runs, newest first")
    ratio = percent_box()
    prompt = gr.Textbox("red apple", label="Prompt", max_length=400)
    seed = seed_box()
    another = gr.Button("Another seed", size="sm")
    compensate = gr.Checkbox(True, label="Repair weights", info=COMPENSATE)
    known = catalog.MODELS["emoji-sdxl"]
    with gr.Accordion("Advanced", open=False):
        steps = lenient(gr.Slider(1, 100, value=known.steps, step=1, label="Time steps"))
        guidance = lenient(gr.Slider(0, 15, value=known.guidance_scale, step=0.5, label="Guidance scale"))
    with gr.Row():
        draw = gr.Button("Draw both", variant="primary", size="lg", scale=3, interactive=False)
        stop = gr.Button("Stop", size="lg", scale=1, min_width=80)
    gr.Examples(EXAMPLES, prompt, label="Try")
    boxes = (run, ratio, prompt, seed, steps, guidance, compensate)
    return dict(zip(SETTINGS, boxes, strict=True)), draw, stop, another


def _wire(browser: Browser, form: dict, empty: gr.Markdown, draw: gr.Button) -> dict:
    """Settings follow the run that is chosen. Returns what the page itself is wired to."""
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    named = form | {"empty": empty, "draw": draw, "runs": browser.runs, "linked": gr.State(0)}
    run = form["run"]
    # Not on every change: a link brings settings of its own.
    run.input(placed(told(defaults), named), run, [form["steps"], form["guidance"]], **hidden)
    run.change(told(lock_size), run, form["ratio"], **hidden)
    return {"named": named, "settings": list(form.values()), "linked": named["linked"]}


def linked_to(linked, *asked):
    """Draw what a link that was opened asks for."""
    if linked:
        yield from compare(*asked)
    else:
        yield {"figures": gr.skip()}


@told
def compare(run, percent, prompt, seed, steps, guidance, compensate, history, drawn_with):
    """Draw both and measure; what was drawn last stays until the new pair is there."""
    if not run:
        raise gr.Error("Prune a model first, in the Prune tab.", duration=8)
    values = (run, percent, prompt, int(seed), steps, guidance, int(compensate))
    asked = dict(zip(QUERY, values, strict=True))
    yield {"figures": show.drawing("the dense image")}
    arguments = (run, percent / 100, prompt, seed, steps, guidance, compensate)
    for dense, pruned, facts in service.compare(*arguments):  # noqa: B007 - the last are shown
        if pruned is None:
            yield {"figures": show.drawing("the pruned image")}
    pair = tuple(saved(sample.image, asked, which) for sample, which in ((dense, ""), (pruned, percent)))
    title = f"{prompt} · seed {int(seed)}"
    shown = [(pair[0], f"{title} · dense"), (pair[1], f"{title} · −{percent} %")]
    known = service.suggestions(run, prompt)
    yield {
        "slider": pair,
        "figures": show.comparison(facts, f"?{urlencode(asked)}", f"{title} · −{facts['ratio']:.1%}", known),
        "history": gr.update(value=(shown + (history or []))[:KEPT], visible=True),
        "drawn_with": [asked, asked, *drawn_with][:KEPT],
        "copy": gr.Button(visible=True),
    }


def saved(image: Image.Image, asked: dict, percent: int | str) -> str:
    """An image as a PNG file that is named by what it shows, with its settings inside."""
    image = for_the_eye(image)
    image.info["parameters"] = (
        f"{asked['prompt']}\nSteps: {asked['steps']}, CFG scale: {asked['guidance']}, Seed: {asked['seed']}, "
        f"Model: {service.status(asked['run'])['model']}, "
        f"ecodiff: {f'{percent} % of the denoiser removed' if percent else 'dense'}"
    )
    words = re.sub(r"\W+", "-", asked["prompt"]).strip("-")[:40] or "image"
    name = f"{words}-seed{asked['seed']}-{f'minus{percent}' if percent else 'dense'}"
    return save_pil_to_cache(image, utils.get_upload_folder(), name, "png")


def pick(event: gr.SelectData):
    """An image of the gallery was opened: its settings can be had back."""
    return event.index, gr.Button(visible=True)


def send_back(drawn_with, picked):
    """The settings that an image of the gallery was drawn with."""
    if not 0 <= picked < len(drawn_with):
        raise gr.Error("Open an image below first.", duration=8)
    found = dict(zip(SETTINGS, drawn_with[picked].values(), strict=True))
    return found | {"compensate": bool(found["compensate"])}


@told
def follow(runs, request: gr.Request):
    """A link that was opened: its run joins this browser's, and its settings are filled in."""
    query = request.query_params
    if "run" not in query:
        return {"tabs": gr.skip()}
    run = query["run"]
    known = service.defaults(run)
    runs = list(dict.fromkeys([*(runs or []), run]))
    return {
        "tabs": gr.Tabs(selected="compare"),
        "runs": runs,
        "run": gr.Dropdown(choices(runs, scored=True), value=run),
        "draw": gr.Button(interactive=True),
        "ratio": int(_number(query, "size", 1, 90, 20)),
        "prompt": query.get("prompt", EXAMPLES[0])[:400],
        "seed": int(_number(query, "seed", 0, 2**31 - 1, 0)),
        "steps": int(_number(query, "steps", 1, 100, known["steps"])),
        "guidance": _number(query, "guidance", 0, 15, known["guidance_scale"]),
        "compensate": query.get("compensate") != "0",
        "linked": 1,  # it draws by itself
    }


def come(runs, current, percent, compensate):
    """From the run that is shown in the Prune tab to its images, at the size that it has there."""
    here = {"tabs": gr.Tabs(selected="compare"), "ratio": percent, "compensate": compensate}
    return here | refresh(runs, current, None)


def _number(query, name: str, least: float, most: float, default: float) -> float:
    """A number of a link, which anybody may have written."""
    try:
        value = float(query[name])
    except (KeyError, ValueError):
        return default
    return min(max(value, least), most) if isfinite(value) else default


def refresh(runs, current, chosen):
    """The runs there are; settings follow the run that is chosen."""
    found = choose(runs, current, chosen)
    newest = found["run"]["value"]
    return found if newest == chosen else found | defaults(newest)


def defaults(run):
    """Time steps and guidance of the run's model: a distilled model draws in few steps, without it."""
    if not run:
        return {"steps": gr.skip(), "guidance": gr.skip()}
    known = service.defaults(run)
    return {"steps": known["steps"], "guidance": known["guidance_scale"]}
