"""What can be done with a run besides building it: LoRAs cut to fit, healing, upload to the Hub."""

import gradio as gr

from ...errors import EcodiffError
from .. import service
from . import show
from .common import lenient, placed, secret, told


def loras(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where a LoRA of the dense model is cut to fit."""
    with gr.Accordion("Use a LoRA of the dense model", open=False):
        gr.Markdown("A LoRA that was made for the dense model, cut to fit this run at this size.")
        lora = gr.File(label="LoRA (.safetensors)", file_types=[".safetensors"], height=150)
        naming = gr.Radio(
            [("diffusers", "diffusers"), ("kohya, for ComfyUI", "kohya")], value="diffusers", label="Naming"
        )
        lora_prompt = gr.Textbox(
            label="Prompt of a preview", max_length=500, info="With the trigger words of the LoRA"
        )
        with gr.Row():
            translate, preview = gr.Button("Cut it to fit"), gr.Button("Preview")
        report = gr.Markdown()
        with gr.Row(visible=False) as pair:
            shown = [
                gr.Image(label=label, interactive=False, format="png", height=260, min_width=240)
                for label in ("Dense, with the LoRA", "Pruned, with the LoRA cut to fit")
            ]
        fitting = gr.DownloadButton("Translated LoRA", interactive=False)
    private = {"api_visibility": "private"}
    named = {"report": report, "fitting": fitting, "pair": pair, "dense": shown[0], "pruned": shown[1]}
    translate.click(placed(fit_lora, named), [run, size, lora, naming], [report, fitting], **private)
    asked = [run, size, lora, lora_prompt]
    preview.click(placed(preview_lora, named), asked, [pair, *shown], **private)


def healing(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where what is left of a run is repaired again, and trained for a while."""
    with gr.Accordion("Heal it: repair what is left again, and train it for a while", open=False):
        gr.Markdown(
            "For large cuts. Weights are repaired on more of the dense model's trajectories (not on the same "
            "ones twice), then trained to draw what it draws, from prompts alone. If images get closer, "
            "images and downloads of this size are the healed model's from then on; if not, nothing changes."
        )
        with gr.Row():
            words = {"label": "Trajectories to repair by", "info": "0: none. Each is as long as an image"}
            repair = lenient(gr.Slider(0, 1024, value=256, step=32, min_width=240, **words))
            words = {"label": "Steps of training", "info": "0: none. Each is a few batches of images long"}
            steps = lenient(gr.Slider(0, 500, value=100, step=10, min_width=240, **words))
        with gr.Row():
            go, end = gr.Button("Heal"), gr.Button("Stop healing", variant="stop", interactive=False)
        report, turn = gr.Markdown(), gr.State(0)
    private = {"api_visibility": "private", "concurrency_limit": 2}
    named = {"report": report, "go": go, "end": end, "turn": turn}
    hidden = private | {"show_progress": "hidden"}
    for event in (go.click, turn.change):
        event(placed(mend, named), [run, size, steps, repair, turn], [*named.values()], **hidden)
    end.click(lambda run: service.stop(run) and None, run, None, queue=False, api_visibility="private")


def pushing(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where a run goes to the Hub, under the account of whoever signs in."""
    with gr.Accordion("Upload to the Hugging Face Hub", open=False):
        gr.LoginButton(size="sm")
        with gr.Row():
            repo = gr.Textbox(label="Repository", placeholder="my-small-model", max_length=96, min_width=240)
            what = gr.Radio(["Pruned pipeline", "Plan alone"], value="Pruned pipeline", label="What")
            private = gr.Checkbox(True, label="Private", info="Only you see it", min_width=120)
        go = gr.Button("Upload")
        report = gr.Markdown()
    go.click(upload, [run, size, repo, what, private], report, api_visibility="private")


@told
def fit_lora(run, percent, file, naming):
    """A LoRA cut to fit, with what was dropped."""
    if not run or not file:
        raise gr.Error("Choose a run and a LoRA file first.", duration=8)
    made = service.lora(run, percent / 100, file, naming)
    dropped = "".join(f"\n- `{name}` dropped: {why}" for name, why in made["dropped"].items())
    file = gr.DownloadButton(made["name"], value=made["path"], interactive=True)
    return {"report": made["report"] + dropped, "fitting": file}


@told
def preview_lora(run, percent, file, prompt):
    """The LoRA on the dense model, and cut to fit on the pruned one."""
    if not run or not file:
        raise gr.Error("Choose a run and a LoRA file first.", duration=8)
    dense, pruned = service.lora_images(run, percent / 100, file, prompt)
    return {"pair": gr.Row(visible=True), "dense": dense.image, "pruned": pruned.image}


@told
def mend(run, percent, steps, repair, turn):
    """Heal a run at a size. On ZeroGPU in calls of a minute: one that ends early starts the next."""
    if not run:
        raise gr.Error("Choose a run first.", duration=8)
    yield {"report": "Starting.", "go": gr.Button(interactive=False), "end": gr.Button(interactive=True)}
    idle = {"go": gr.Button(interactive=True), "end": gr.Button(interactive=False)}
    try:
        for found in service.heal(run, percent / 100, int(steps), int(repair)):
            yield {"report": show.healing(found)}
    except EcodiffError as error:
        yield idle | {"report": str(error)}
        return
    more = {"turn": turn + 1} if found["stage"] == "interrupted" else {}
    yield idle | more | {"report": show.healing(found)}


@told
def upload(run, percent, repo, what, private, token: gr.OAuthToken | None = None):
    """Put the pruned pipeline or its plan on the Hub."""
    if not run or not repo.strip():
        raise gr.Error("Choose a run, and give the repository a name.", duration=8)
    found = service.push(run, percent / 100, repo.strip(), secret(token), what == "Plan alone", private)
    return f"Uploaded to [{found['url']}]({found['url']})."
