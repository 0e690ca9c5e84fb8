"""What all tabs share: errors for people, and the list of runs that this browser knows."""

import functools
import inspect
from collections.abc import Callable

import gradio as gr

from .. import catalog, service
from ..errors import EcodiffError
from ..groups import WORDS

MODELS = [(model.title, model.name) for model in catalog.MODELS.values()]
PRESETS = [
    ("Fast: a minute or two on the small model", "fast"),
    ("Balanced", "balanced"),
    ("Paper: as many trajectories as the paper", "paper"),
    ("EcoDiff as published, to compare with", "ecodiff"),
]
COMPENSATE = "What stays takes over from what went: closer images, same size"
KINDS = [(word[0].upper() + word[1:], kind) for kind, word in WORDS.items()]


def readable(error: Exception) -> gr.Error:
    """An error as the page shows it. Of what a ZeroGPU worker did not expect, only a class name is left."""
    if not isinstance(error, gr.Error):
        return gr.Error(str(error), duration=15, print_exception=False)
    if error.message.isidentifier():
        error.message = (
            f"The GPU worker failed ({error.message}), which ecodiff did not expect. Nothing is lost: "
            "try again, and report it if it comes back."
        )
    return error


def told(function: Callable) -> Callable:
    """Turn ecodiff's errors into Gradio's, so that the person reads their text."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
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


def label(status: dict) -> str:
    """A run's name in a list: its own, or what it is and when it was started."""
    import time

    when = time.strftime("%d %b %H:%M", time.localtime(status["created"]))
    return status["name"] or f"{status['model']} · {status['preset']} · {when}"


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
    """(label, id) of those runs; `scored`: only those that something can be cut from."""
    return [(label(s), s["run"]) for s in mine(runs) if s["step"] or not scored]
