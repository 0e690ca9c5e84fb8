"""The rows of the Library: a run each, with its picture, its state and what can be done with it."""

from collections.abc import Callable
from html import escape

import gradio as gr

from ...errors import EcodiffError
from .. import service
from . import show
from .common import label, mine, secret, told, when

ORDERS = {
    "Newest first": lambda row: -row["created"],
    "Name": lambda row: row["name"].lower(),
    "Largest on disk first": lambda row: -row["bytes"],
}
POLL_SECONDS = 3
SURE = "(run, runs) => confirm('Delete this run and its files?') ? [run, runs] : [null, runs]"


def listing(runs: list[str] | None) -> list[dict]:
    """What the rows show of each run."""
    found = []
    for status in mine(runs or []):
        picked = {name: status[name] for name in ("run", "created", "stage", "step")}
        try:
            image, size = service.picture(status["run"]), service.disk_bytes(status["run"])
        except EcodiffError:  # deleted meanwhile, elsewhere
            continue
        found.append(
            picked
            | {
                "name": label(status),
                "html": card(status, image, size),
                "words": words(status),
                "bytes": size,
            }
        )
    return found


def words(status: dict) -> str:
    """What a search looks at."""
    parts = (label(status), status["model"], status["preset"], show.STAGES[status["stage"]], status["run"])
    return " ".join(parts).lower()


def matching(found: list[dict], asked: str, order: str) -> list[dict]:
    """Those rows that have every word that is asked for, in an order of `ORDERS`."""
    rows = [row for row in found if all(word in row["words"] for word in asked.lower().split())]
    return sorted(rows, key=ORDERS[order])


def card(status: dict, image: str, size: int) -> str:
    """A run's picture, name, state and size."""
    learned = status["preset"] != "imported"
    facts = [status["model"], when(status["created"]), service.megabytes(size)]
    if learned:
        facts[1:1] = [status["preset"], f"for −{status['ratio']:.0%}"]
    if status["expires"]:
        facts.append(f"kept until {when(status['expires'])}")
    state = show.STAGES[status["stage"]]
    if learned and status["stage"] != "finished":
        state += f", step {status['step']} of {status['steps']}"
    drawn = f'<img src="{image}" alt="An image of this run">' if image else '<span class="none"></span>'
    return (
        f'<div class="eco-shelf">{drawn}<div><b>{escape(label(status))}</b><br>'
        f"{escape(state)}<br><small>{escape(' · '.join(facts))}</small></div></div>"
    )


def rows(
    found: list[dict], asked: str, order: str, act: Callable[[str, gr.Button, gr.Textbox], None]
) -> None:
    """Lay the rows out. `act(what, button, run)` wires a button of a run."""
    shown = matching(found, asked or "", order)
    if found and not shown:
        gr.Markdown("No run matches these words.")
    for row in shown:
        active, done = row["stage"] in service.ACTIVE, row["stage"] == "finished"
        # Not a State, whose value the question of the "Delete" button could not take away.
        run = gr.Textbox(row["run"], visible=False)
        with gr.Row(elem_classes="eco-shelf-row", key=row["run"]):
            gr.HTML(row["html"])
            buttons = {"open": "Open"}
            buttons |= {"stop": "Stop"} if active else {} if done else {"resume": "Resume"}
            buttons |= {"download": "Download"} if row["step"] and not active else {}
            buttons |= {} if active else {"delete": "Delete"}
            for what, text in buttons.items():
                look = {"stop": "stop", "delete": "stop"}.get(what, "secondary")
                act(what, gr.Button(text, size="sm", variant=look, min_width=84, scale=0), run)


@told
def stop(run: str) -> None:
    """Ask a run to stop."""
    service.stop(run)


@told
def resume(run: str, token: gr.OAuthToken | None = None) -> None:
    """Go on with a run."""
    service.resume(run, secret(token))
