"""The Library tab: the runs that this browser started."""

import gradio as gr

from ...errors import EcodiffError
from .. import service
from . import show
from .common import (
    MODELS,
    Browser,
    Tab,
    choices,
    label,
    lenient,
    lock_size,
    mine,
    percent_box,
    placed,
    told,
    when,
)


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs = browser.runs
    gr.Markdown(
        "Your runs. They are known to this browser only; whoever has a run's id can open it, "
        "so keep ids to yourself."
    )
    empty = gr.Markdown("No runs yet. Start one in the **Prune** tab.")
    with gr.Column(visible=False) as shelf:
        table = gr.HTML()
        with gr.Row():
            run = gr.Dropdown([], label="Run", scale=3, min_width=240)
            name = gr.Textbox(label="New name", max_length=60, scale=3, min_width=240)
            with gr.Column(scale=1, min_width=120):
                rename = gr.Button("Rename", size="sm")
                delete = gr.Button("Delete", size="sm", variant="stop")
        size = percent_box()
        chosen = gr.Radio(service.formats(), value="diffusers", label="Format")
        make = gr.Button("Build checkpoint", variant="primary")
        with gr.Row():
            plan = gr.DownloadButton("Plan file", interactive=False)
            model = gr.DownloadButton("Pruned pipeline", interactive=False)
        about = gr.Markdown()
        code = gr.Code(language="python", label="Load it", visible=False, interactive=False)
        _loras(run, size)
        _healing(run, size)
        if service.offers_sign_in():
            _pushing(run, size)
    dense, brought, repo, take = _bringing()
    with gr.Accordion("Open a run by its id", open=False), gr.Row():
        known = gr.Textbox(label="Id", max_length=32)
        add = gr.Button("Open")

    private = {"api_visibility": "private"}
    named = {"empty": empty, "shelf": shelf, "table": table, "run": run, "runs": runs}
    named |= {"plan": plan, "model": model, "about": about, "code": code}
    listed, shown = [empty, shelf, table, run], placed(refresh, named)
    rename.click(placed(give_name, named), [run, name, runs], listed, **private)
    sure = "(run, runs) => confirm('Delete this run and its files?') ? [run, runs] : [null, runs]"
    delete.click(placed(remove, named), [run, runs], [runs, *listed], js=sure, **private)
    run.change(told(lock_size), run, size, show_progress="hidden", **private)
    make.click(placed(files, named), [run, size, chosen], [plan, model, about, code], **private)
    opened = add.click(open_run, [known, runs], runs, **private)
    opened.success(shown, [runs, run], listed, **private)
    taken = take.click(bring, [dense, brought, repo, runs], runs, **private)
    taken.success(shown, [runs, run], listed, **private)
    return Tab(shown, [runs, run], listed)


def _loras(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where a LoRA of the dense model is cut to fit."""
    with gr.Accordion("Use a LoRA of the dense model", open=False):
        gr.Markdown("A LoRA that was made for the dense model, cut to fit this run at this size.")
        lora = gr.File(label="LoRA (.safetensors)", file_types=[".safetensors"], height=150)
        naming = gr.Radio(
            [("diffusers", "diffusers"), ("kohya, for ComfyUI", "kohya")], value="diffusers", label="Naming"
        )
        lora_prompt = gr.Textbox(
            label="Prompt of a preview", max_length=500, info="With the words that wake the LoRA"
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


def _healing(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where what is left of a run is trained for a while."""
    with gr.Accordion("Heal it: train what is left for a while", open=False):
        gr.Markdown(
            "For large cuts. What is left learns to draw what the dense model draws, from prompts alone. "
            "Minutes do little; hours were not tried. If images get closer, images and downloads of this "
            "size are the healed model's from then on; if not, nothing changes."
        )
        steps = lenient(
            gr.Slider(10, 500, value=100, step=10, label="Steps", info="Each is a few generations long")
        )
        with gr.Row():
            go, end = gr.Button("Heal"), gr.Button("Stop healing", variant="stop", interactive=False)
        report, turn = gr.Markdown(), gr.State(0)
    private = {"api_visibility": "private", "concurrency_limit": 2}
    named = {"report": report, "go": go, "end": end, "turn": turn}
    hidden = private | {"show_progress": "hidden"}
    for event in (go.click, turn.change):
        event(placed(mend, named), [run, size, steps, turn], [*named.values()], **hidden)
    end.click(lambda run: service.stop(run) and None, run, None, queue=False, api_visibility="private")


def _pushing(run: gr.Dropdown, size: gr.Slider) -> None:
    """Where a run goes to the Hub, under the account of whoever signs in."""
    with gr.Accordion("Put it on the Hugging Face Hub", open=False):
        gr.LoginButton(size="sm")
        with gr.Row():
            repo = gr.Textbox(label="Repository", placeholder="my-small-model", max_length=96, min_width=240)
            what = gr.Radio(["Pruned pipeline", "Plan alone"], value="Pruned pipeline", label="What")
            private = gr.Checkbox(True, label="Private", info="Only you see it", min_width=120)
        go = gr.Button("Upload")
        report = gr.Markdown()
    go.click(upload, [run, size, repo, what, private], report, api_visibility="private")


def _bringing() -> tuple[gr.Dropdown, gr.File, gr.Textbox, gr.Button]:
    """Where what others learned is handed in."""
    with gr.Accordion("Import a plan, a pruned model or EcoDiff's masks", open=False):
        gr.Markdown(
            "A plan file, the zip of a pruned model, or the `.pt` masks that EcoDiff's authors publish (of "
            "heads, of neurons, or both). Only the plan in it is used: weights are cut from the dense model."
        )
        with gr.Row():
            dense = gr.Dropdown(
                MODELS, value="emoji-sdxl", label="Dense model", allow_custom_value=True, min_width=240
            )
            brought = gr.File(
                label="Files",
                file_count="multiple",
                file_types=[".safetensors", ".zip", ".pt"],
                height=150,
                min_width=240,
            )
            repo = gr.Textbox(
                label="Or its Hub id",
                placeholder="user/name",
                info="A plan, or a pruned model",
                max_length=96,
                min_width=240,
            )
        take = gr.Button("Open it")
    return dense, brought, repo, take


def row(status: dict) -> dict[str, str]:
    """A run in the table."""
    learned = status["preset"] != "imported"
    return {
        "Name": label(status),
        "Started": when(status["created"]),
        "Model": status["model"],
        "Preset": status["preset"],
        "Learned for": f"−{status['ratio']:.0%}" if learned else "brought",
        "Step": f"{status['step']}/{status['steps']}" if learned else "–",
        "State": show.STAGES[status["stage"]],
        "Kept": f"until {when(status['expires'])}" if status["expires"] else "until deleted",
    }


def refresh(runs, chosen):
    """The shelf as it is now; `chosen` stays chosen if it is still there."""
    found = choices(runs)
    ids = [value for _, value in found]
    value = chosen if chosen in ids else (ids or [None])[0]
    return {
        "empty": gr.update(visible=not found),
        "shelf": gr.update(visible=bool(found)),
        "table": show.table([row(status) for status in mine(runs)], "Runs"),
        "run": gr.Dropdown(found, value=value),
    }


@told
def give_name(run, name, runs):
    """Rename a run."""
    if not run:
        raise gr.Error("Choose a run first.", duration=8)
    service.rename(run, name)
    return refresh(runs, run)


@told
def remove(run, runs):
    """Delete a run."""
    if not run:
        return {"runs": gr.skip()}
    service.delete(run)
    runs = [other for other in runs or [] if other != run]
    return {"runs": runs} | refresh(runs, None)


@told
def files(run, percent, chosen):
    """The plan and the pruned folder, as downloads."""
    if not run:
        raise gr.Error("Choose a run first.", duration=8)
    made = service.export(run, percent / 100, format=chosen)
    return {
        "plan": gr.DownloadButton(value=service.plan_file(run, percent / 100), interactive=True),
        "model": gr.DownloadButton(f"{made['name']}", value=made["path"], interactive=True),
        "about": f"{service.megabytes(made['bytes'])} · SHA-256 `{made['sha256']}` · run id `{run}`",
        "code": gr.Code(made["code"], visible=True),
    }


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
def mend(run, percent, steps, turn):
    """Heal a run at a size. On ZeroGPU in calls of a minute: one that ends early starts the next."""
    if not run:
        raise gr.Error("Choose a run first.", duration=8)
    yield {"report": "Starting.", "go": gr.Button(interactive=False), "end": gr.Button(interactive=True)}
    idle = {"go": gr.Button(interactive=True), "end": gr.Button(interactive=False)}
    try:
        for found in service.heal(run, percent / 100, int(steps)):
            yield {"report": show.healing(found)}
    except EcodiffError as error:
        yield idle | {"report": str(error)}
        return
    more = {"turn": turn + 1} if found["stage"] == "interrupted" else {}
    yield idle | more | {"report": show.healing(found)}


@told
def bring(model, files, repo, runs, token: gr.OAuthToken | None = None):
    """A run of what was learned elsewhere."""
    made = service.import_(model, files or [], repo, token.token if token else "")["run"]
    return [*(runs or []), made]


@told
def upload(run, percent, repo, what, private, token: gr.OAuthToken | None = None):
    """Put the pruned pipeline or its plan on the Hub."""
    if not run or not repo.strip():
        raise gr.Error("Choose a run, and give the repository a name.", duration=8)
    signed = token.token if token else ""
    found = service.push(run, percent / 100, repo.strip(), signed, what == "Plan alone", private)
    return f"Uploaded to [{found['url']}]({found['url']})."


@told
def open_run(run, runs):
    """Let this browser know a run that another one started."""
    service.status(run.strip())
    return list(dict.fromkeys([*(runs or []), run.strip()]))
