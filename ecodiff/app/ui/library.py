"""The Library tab: the runs that this browser started."""

import time

import gradio as gr

from .. import service
from . import extras, shelf
from .common import MODELS, Browser, Tab, lock_size, percent_box, placed, secret, told

LISTED = ("empty", "found", "listed", "run", "timer")
BUILT = ("plan", "model", "about", "code", "built")


def build(browser: Browser) -> Tab:
    """Lay out the tab."""
    runs = browser.runs
    gr.Markdown(
        "Your runs. They are known to this browser only; whoever has a run's id can open it, "
        "so keep ids to yourself."
    )
    empty = gr.Markdown("No runs yet. Start one in the **Prune** tab.")
    listed, timer = gr.State([]), gr.Timer(shelf.POLL_SECONDS, active=False)
    with gr.Column(visible=False) as found:
        with gr.Row():
            words = gr.Textbox(label="Search", placeholder="Words of a name, model or state", min_width=200)
            order = gr.Dropdown([*shelf.ORDERS], value=next(iter(shelf.ORDERS)), label="Order", min_width=160)
        place = gr.Column()
        tools = _tools(browser)
    opened = gr.State([])  # [run, when]: the page shows it in the Prune tab
    tools |= {"listed": listed, "found": found, "empty": empty, "timer": timer, "opened": opened}
    _rows(place, [listed, words, order], browser, tools)
    dense, brought, repo, take = _bringing()
    with gr.Accordion("Open a run by its id", open=False), gr.Row():
        known = gr.Textbox(label="Id", max_length=32)
        add = gr.Button("Open")

    outputs = [tools[name] for name in LISTED]
    shown = placed(refresh, tools)
    private = {"api_visibility": "private"}
    renamed = [tools["run"], tools["name"], runs]
    tools["rename"].click(placed(give_name, tools), renamed, outputs, **private)
    timer.tick(shown, [runs, tools["run"]], outputs, show_progress="hidden", **private)
    added = gr.on([add.click, known.submit], open_run, [known, runs], runs, **private)
    added.success(shown, [runs, tools["run"]], outputs, **private)
    taken = take.click(bring, [dense, brought, repo, runs], runs, **private)
    taken.success(shown, [runs, tools["run"]], outputs, **private)
    return Tab(shown, [runs, tools["run"]], outputs, {"opened": opened})


def _tools(browser: Browser) -> dict[str, gr.components.Component]:
    """What can be made of the run that is chosen."""
    runs, private = browser.runs, {"api_visibility": "private"}
    with gr.Row():
        run = gr.Dropdown([], label="Run", scale=3, min_width=240)
        name = gr.Textbox(label="New name", max_length=60, scale=3, min_width=240)
        rename = gr.Button("Rename", size="sm", scale=1, min_width=100)
    size = percent_box()
    chosen = gr.Dropdown(service.formats(), value="diffusers", label="Format")
    lean = gr.Checkbox(
        False,
        label="Leave out unused layers of text encoders",
        info="What the pipeline never reads. Same images; of no use then for editing or to rewrite prompts",
    )
    make = gr.Button("Build checkpoint", variant="primary")
    with gr.Row():
        plan = gr.DownloadButton("Plan file", interactive=False)
        model = gr.DownloadButton("Pruned pipeline", interactive=False)
    about = gr.Markdown()
    code = gr.Code(language="python", label="Load it", visible=False, interactive=False)
    extras.loras(run, size)
    extras.healing(run, size)
    if service.offers_sign_in():
        extras.pushing(run, size)
    tools = {"run": run, "runs": runs, "plan": plan, "model": model, "about": about, "code": code}
    tools |= {"size": size, "format": chosen, "lean": lean, "name": name, "rename": rename}
    tools["built"] = gr.State([])  # what is built is of: run, size, format, lean
    run.change(told(lock_size), run, size, show_progress="hidden", **private)
    asked, built = [run, size, chosen, lean], [tools[name] for name in BUILT]
    for box in asked:
        box.change(placed(unbuilt, tools), [*asked, tools["built"]], built, show_progress="hidden", **private)
    make.click(placed(files, tools), asked, built, **private)
    return tools


def _rows(place: gr.Column, shown_by: list, browser: Browser, tools: dict) -> None:
    """The rows, laid out anew whenever what they show has changed."""
    runs, run, private = browser.runs, tools["run"], {"api_visibility": "private"}
    outputs, shown = [tools[name] for name in LISTED], placed(refresh, tools)
    built = [tools[name] for name in BUILT]

    def act(what: str, button: gr.Button, row: gr.Textbox) -> None:
        if what == "open":
            button.click(lambda run: [run, time.time()], row, tools["opened"], **private)
        elif what == "download":
            picked = button.click(lambda row: row, row, run, show_progress="hidden", **private)
            picked.then(
                placed(files, tools), [row, tools["size"], tools["format"], tools["lean"]], built, **private
            )
        elif what == "delete":
            button.click(placed(remove, tools), [row, runs], [runs, *outputs], js=shelf.SURE, **private)
        else:
            done = button.click({"stop": shelf.stop, "resume": shelf.resume}[what], row, None, **private)
            done.then(shown, [runs, run], outputs, show_progress="hidden", **private)

    with place:

        @gr.render(inputs=shown_by, show_progress="hidden")
        def lay_out(listed, words, order):
            shelf.rows(listed, words, order, act)


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


def refresh(runs, chosen):
    """The shelf as it is now; `chosen` stays chosen if it is still there."""
    listed = shelf.listing(runs)
    ids = [row["run"] for row in listed]
    return {
        "empty": gr.update(visible=not listed),
        "found": gr.update(visible=bool(listed)),
        "listed": listed,
        "run": gr.Dropdown(
            [(row["name"], row["run"]) for row in listed],
            value=chosen if chosen in ids else (ids or [None])[0],
        ),
        "timer": gr.Timer(active=any(row["stage"] in service.ACTIVE for row in listed)),
    }


@told
def give_name(run, name, runs):
    """Rename a run."""
    if not run or not name.strip():
        raise gr.Error("Choose a run, and write its new name.", duration=8)
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


def unbuilt(run, percent, chosen, lean, built):
    """Nothing is built yet of what is chosen now; unless it is what was built last."""
    if built == [run, percent, chosen, lean]:
        return {"built": gr.skip()}
    return {
        "plan": gr.DownloadButton("Plan file", value=None, interactive=False),
        "model": gr.DownloadButton("Pruned pipeline", value=None, interactive=False),
        "about": "",
        "code": gr.Code(visible=False),
        "built": [],
    }


@told
def files(run, percent, chosen, lean):
    """The plan and the pruned folder, as downloads."""
    if not run:
        raise gr.Error("Choose a run first.", duration=8)
    if size := service.status(run)["size"]:  # of a run of a plan
        percent = round(100 * size)
    made = service.export(run, percent / 100, format=chosen, lean=lean)
    about = [service.megabytes(made["bytes"]), f"SHA-256 `{made['sha256']}`", f"run id `{run}`"]
    about += [service.left_out(made["left_out"])] if lean else []
    return {
        "built": [run, percent, chosen, lean],
        "plan": gr.DownloadButton(value=service.plan_file(run, percent / 100), interactive=True),
        "model": gr.DownloadButton(f"{made['name']}", value=made["path"], interactive=True),
        "about": " · ".join(about),
        "code": gr.Code(made["code"], visible=bool(made["code"])),
    }


@told
def bring(model, files, repo, runs, token: gr.OAuthToken | None = None):
    """A run of what was learned elsewhere."""
    made = service.import_(model, files or [], repo, secret(token))["run"]
    return [*(runs or []), made]


@told
def open_run(run, runs):
    """Let this browser know a run that another one started."""
    service.status(run.strip())
    return list(dict.fromkeys([*(runs or []), run.strip()]))
