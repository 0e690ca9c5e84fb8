"""The Compare tab: one prompt, one noise, dense and pruned; a link gives the comparison to others."""

from math import isfinite
from urllib.parse import urlencode

import gradio as gr
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

# The clipboard is there on https and on this machine only; on plain http a selection is copied.
COPY = """() => {
  const link = document.querySelector('#figures a').href;
  if (navigator.clipboard) return navigator.clipboard.writeText(link).then(() => []);
  const box = Object.assign(document.createElement('textarea'), {value: link});
  document.body.append(box); box.select(); document.execCommand('copy'); box.remove();
  return [];
}"""

QUERY = ("run", "size", "prompt", "seed", "steps", "guidance", "compensate")  # of a link

EXAMPLES = ["red apple", "woman artist, medium skin tone", "cat face", "rocket", "france flag"]


def for_the_eye(image: Image.Image) -> Image.Image:
    """Small images are shown larger; what the API returns keeps its size."""
    factor = max(1, 448 // image.width)
    return image.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs, current = browser.runs, browser.current
    empty = gr.Markdown("Nothing to compare yet: prune a model first, in the **Prune** tab.")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            run = gr.Dropdown([], label="Pruned model", info="Your runs, newest first")
            ratio = percent_box()
            prompt = gr.Textbox("red apple", label="Prompt", max_length=400)
            seed = seed_box()
            another = gr.Button("Another seed", size="sm")
            compensate = gr.Checkbox(True, label="Repair weights", info=COMPENSATE)
            known = catalog.MODELS["emoji-sdxl"]
            with gr.Accordion("Advanced", open=False):
                steps = lenient(gr.Slider(1, 100, value=known.steps, step=1, label="Time steps"))
                guidance = lenient(
                    gr.Slider(0, 15, value=known.guidance_scale, step=0.5, label="Guidance scale")
                )
            draw = gr.Button("Draw both", variant="primary", size="lg")
            gr.Examples(EXAMPLES, prompt, label="Try")
        with gr.Column(scale=3, min_width=300):
            slider = gr.ImageSlider(label="Dense ◂ ▸ pruned", format="png", max_height=460, interactive=False)
            figures = gr.HTML(elem_id="figures")
            copy = gr.Button("Copy the link", size="sm", visible=False)
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

    settings = [run, ratio, prompt, seed, steps, guidance, compensate]
    names = ("run", "ratio", "prompt", "seed", "steps", "guidance", "compensate")
    named = dict(zip(names, settings, strict=True)) | {"empty": empty, "runs": runs}
    drawn = {"slider": slider, "figures": figures, "history": history, "copy": copy}
    gr.on(
        [draw.click, prompt.submit],
        placed(compare, drawn),
        [*settings, history],
        [*drawn.values()],
        api_visibility="private",
    )
    another.click(None, None, seed, js="() => Math.floor(Math.random() * 2**31)", api_visibility="private")
    copy.click(None, js=COPY, api_visibility="private")

    # Not on every change: a link brings settings of its own.
    hidden = {"api_visibility": "private", "show_progress": "hidden"}
    run.input(placed(told(defaults), named), run, [steps, guidance], **hidden)

    parts = {"named": named, "settings": settings}
    run.change(told(lock_size), run, ratio, **hidden)
    return Tab(placed(refresh, named), [runs, current, run], [run, empty, steps, guidance], parts)


@told
def compare(run, percent, prompt, seed, steps, guidance, compensate, history):
    """Draw both and measure."""
    if not run:
        raise gr.Error("Prune a model first, in the Prune tab.", duration=8)
    asked = (run, percent / 100, prompt, seed, steps, guidance, compensate)
    dense, pruned, facts = service.compare(*asked)
    pair = tuple(for_the_eye(sample.image) for sample in (dense, pruned))
    title = f"{prompt} · seed {seed}"
    shown = [(pair[0], f"{title} · dense"), (pair[1], f"{title} · −{percent} %")]
    values = (run, percent, prompt, int(seed), steps, guidance, int(compensate))
    link = f"?{urlencode(dict(zip(QUERY, values, strict=True)))}"
    older = gr.update(value=shown + (history or [])[:22], visible=True)
    shown_facts = show.comparison(facts, link)
    return {"slider": pair, "figures": shown_facts, "history": older, "copy": gr.Button(visible=True)}


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
        "ratio": int(_number(query, "size", 1, 90, 20)),
        "prompt": query.get("prompt", EXAMPLES[0])[:400],
        "seed": int(_number(query, "seed", 0, 2**31 - 1, 0)),
        "steps": int(_number(query, "steps", 1, 100, known["steps"])),
        "guidance": _number(query, "guidance", 0, 15, known["guidance_scale"]),
        "compensate": query.get("compensate") != "0",
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
