"""What all tabs share: errors for people, and the list of runs that this browser knows."""

import functools
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from ... import catalog, units
from ...errors import EcodiffError
from .. import limits, service
from ..server import server

# What is typed finds a model by its label.
MODELS = [
    (m.title if m.name in m.title else f"{m.title} · {m.name}", m.name) for m in catalog.MODELS.values()
]

PRESETS = [
    ("Fast", "fast"),
    ("Balanced", "balanced"),
    ("Surgeon (counts the repair)", "surgeon"),
    ("Thorough (surgeon, four times the trajectories)", "thorough"),
    ("Gauss-Newton (large transformers)", "gauss-newton"),
    ("Paper (as many trajectories as the paper)", "paper"),
    ("EcoDiff as published", "ecodiff"),
]

COMPENSATE = "Repairs the weights that stay, in closed form: closer images, same size"

KINDS = [(kind.word[0].upper() + kind.word[1:], name) for name, kind in units.KINDS.items()]


@dataclass(frozen=True)
class Browser:
    """What the browser keeps, for all tabs: the ids of its runs, and that of the one that is shown."""

    runs: gr.BrowserState
    current: gr.BrowserState


@dataclass
class Tab:
    """One tab of the page, laid out.

    Attributes:
        refresh, inputs, outputs: what is asked again when the tab is chosen; None: nothing.
        parts: components and handlers that other tabs are wired to, by name.
    """

    refresh: Callable | None = None
    inputs: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)


def readable(error: Exception) -> gr.Error:
    """An error as the page shows it. Of what a ZeroGPU worker did not expect, only a class name is left."""
    if not isinstance(error, gr.Error):
        said = str(error).replace(str(server().store.root), "…")  # where runs are is the server's affair
        return gr.Error(said, duration=15, print_exception=False)
    if error.message.isidentifier():
        error.message = (
            f"The GPU worker failed ({error.message}), which ecodiff did not expect. Nothing is lost: "
            "try again, and report it if it comes back."
        )
    return error


def address() -> str:
    """Where the request that is being answered comes from, as far as can be told."""
    request = LocalContext.request.get(None)
    if request is None:
        return ""
    forwarded = request.headers.get("x-forwarded-for", "").partition(",")[0].strip()  # a Space has a proxy
    return forwarded or getattr(request.client, "host", "")


def told(function: Callable) -> Callable:
    """Turn ecodiff's errors into Gradio's, so that the person reads their text; note who it is."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        limits.come_from(address())
        try:
            return function(*args, **kwargs)
        except (EcodiffError, gr.Error) as error:
            raise readable(error) from None

    @functools.wraps(function)
    def generator(*args, **kwargs):
        try:
            yield from function(*args, **kwargs)
        except (EcodiffError, gr.Error) as error:
            raise readable(error) from None

    return generator if inspect.isgeneratorfunction(function) else wrapper


def placed(function: Callable, components: dict[str, gr.components.Component]) -> Callable:
    """A handler that returns (or yields) updates by name as one that gives them by component.

    Components that are not named stay as they are.
    """

    def at(updates: dict[str, Any]) -> dict:
        return {components[name]: update for name, update in updates.items()}

    @functools.wraps(function)
    def wrapper(*args):
        return at(function(*args))

    @functools.wraps(function)
    def generator(*args):
        for updates in function(*args):
            yield at(updates)

    return generator if inspect.isgeneratorfunction(function) else wrapper


def secret(token: gr.OAuthToken | None) -> str:
    """The token of whoever is signed in; "" if nobody is."""
    return token.token if token else ""


def lenient(box: gr.Slider | gr.Number) -> gr.Slider | gr.Number:
    """Take a number as the box will show it once it is left: within bounds, and the least if it is empty.

    Gradio hands it over while it is typed, and would answer "3" on the way to "30" with an error of its own.
    """
    strict, least, most = box.preprocess, box.minimum, box.maximum
    # Not a subclass: Gradio writes a .pyi file beside the source of each.
    box.preprocess = lambda typed: strict(least if typed is None else min(max(typed, least), most))
    return box


def percent_box(elem_id: str | None = None) -> gr.Slider:
    """How much goes, wherever a person says it."""
    words = {"label": "Remove", "info": "% of the denoiser's parameters"}
    return lenient(gr.Slider(1, 90, value=20, step=1, elem_id=elem_id, **words))


def seed_box() -> gr.Number:
    """The seed of noise or of learning."""
    return lenient(gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1))


def when(seconds: float) -> str:
    """A time for people, of the server's clock."""
    return time.strftime("%d %b %H:%M", time.localtime(seconds))


def label(status: dict) -> str:
    """A run's name in a list: its own, or what it is and when it was started."""
    return status["name"] or f"{status['model']} · {status['preset']} · {when(status['created'])}"


def mine(runs: list[str]) -> list[dict]:
    """Status of the runs that this browser started and that still exist, newest first."""
    found = []
    for run in runs or []:
        try:
            found.append(service.status(run))
        except EcodiffError:
            continue
    return sorted(found, key=lambda status: -status["created"])


def choices(runs: list[str], scored: bool = False) -> list[tuple[str, str]]:
    """(label, id) of those runs; `scored`: only those that something can be cut from, and the examples."""
    found = [(label(s), s["run"]) for s in mine(runs) if s["step"] or not scored]
    examples = service.examples() if scored else []
    return found + [(s["name"], s["run"]) for s in examples if s["run"] not in (runs or [])]


def lock_size(run: str | None) -> dict:
    """The size of a run that was made of a plan cannot be moved; that of others can."""
    size = service.status(run)["size"] if run else None
    if size is None:
        return gr.update(interactive=True)
    return gr.update(value=round(100 * size), interactive=False)


def choose(runs: list[str], current: str, chosen: str | None) -> dict[str, dict]:
    """Updates of a dropdown of runs ("run"), of the text for when there is none ("empty"), and of the button
    that draws what is chosen ("draw").

    What was chosen stays chosen; else it is what was pruned last.
    """
    found = choices(runs, scored=True)
    ids = [value for _, value in found]
    newest = ids[0] if ids else None
    value = chosen if chosen in ids else current if current in ids else newest
    return {
        "run": gr.update(choices=found, value=value),
        "empty": gr.update(visible=not found),
        "draw": gr.update(interactive=bool(found)),
    }
