"""Named endpoints: everything on the page, for gradio_client and HTTP."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated

import gradio as gr
from pydantic import Field, ValidationError, validate_call

from ...app import service
from .common import told

Seed = Annotated[int, Field(ge=0, lt=2**31)]


def build() -> None:
    """Register the endpoints. Call inside Blocks."""
    _plain()
    _with_images()
    _with_files()


def typed(function: Callable) -> Callable:
    """Refuse arguments that are not what `function` is annotated with: anybody may send any JSON."""
    names, checked = list(inspect.signature(function).parameters), validate_call(function)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return checked(*args, **kwargs)
        except ValidationError as error:
            wrong = error.errors()[0]
            name = wrong["loc"][0]
            name = names[name] if isinstance(name, int) else name
            raise gr.Error(
                f"{name} is {wrong['input']!r:.80}. {wrong['msg']}.", print_exception=False
            ) from None

    return wrapper


def _plain() -> None:
    """Endpoints that take and give plain data."""

    def predict(model: str, ratio: float) -> dict:
        return service.predict(model, ratio)

    def prune_start(
        model: str = "emoji-sdxl",
        ratio: float = 0.2,
        preset: str = "fast",
        seed: Seed = 0,
        kinds: list[str] | None = None,
    ) -> dict:
        return service.start(model, ratio, preset, seed, kinds)

    def prune_status(run: str) -> dict:
        return service.status(run)

    def prune_step(run: str) -> dict:
        for found in service.learn(run):  # noqa: B007 - the last one is the answer
            pass
        return found

    def prune_stop(run: str) -> dict:
        return service.stop(run)

    def prune_resume(run: str) -> dict:
        return service.resume(run)

    def cut(run: str, ratio: float) -> dict:
        return service.cut(run, ratio)

    def rename(run: str, name: str) -> dict:
        return service.rename(run, name)

    def delete(run: str) -> dict:
        return service.delete(run)

    def heal(run: str, ratio: float, steps: int = 100) -> dict:
        for found in service.heal(run, ratio, steps):  # noqa: B007 - the last one is the answer
            pass
        return found

    def push(
        run: str, ratio: float, repo: str, token: str, plan_only: bool = False, private: bool = True
    ) -> dict:
        return service.push(run, ratio, repo, token, plan_only, private)

    def sizes(run: str, ratios: list[float], count: int = 8, compensate: bool = True) -> dict:
        rows = [row for _, row in service.sizes(run, ratios, count, compensate)]
        return {"means": service.means(rows), "rows": rows}

    for function, source in (
        (predict, service.predict),
        (prune_start, service.start),
        (prune_status, service.status),
        (prune_step, service.learn),
        (prune_stop, service.stop),
        (prune_resume, service.resume),
        (cut, service.cut),
        (sizes, service.sizes),
        (rename, service.rename),
        (delete, service.delete),
        (heal, service.heal),
        (push, service.push),
    ):
        function.__doc__ = source.__doc__
        gr.api(told(typed(function)), api_name=function.__name__, api_description=source.__doc__)


def _with_images() -> None:
    """/compare: gr.api passes plain data only, so images need components.

    A component without a value would have to be given: 0 steps and guidance below 0 are the model's own.
    """
    run, ratio, prompt = gr.Textbox(visible=False), gr.Number(visible=False), gr.Textbox(visible=False)
    seed, steps = gr.Number(0, precision=0, visible=False), gr.Number(0, precision=0, visible=False)
    guidance, compensated = gr.Number(-1, visible=False), gr.Checkbox(True, visible=False)
    dense = gr.Image(visible=False, format="png")
    pruned = gr.Image(visible=False, format="png")

    @told
    @typed
    def compare(
        run: str,
        ratio: float,
        prompt: str,
        seed: Seed | None,
        steps: int | None,
        guidance_scale: float | None,
        compensate: bool = True,
    ):
        own = guidance_scale is None or guidance_scale < 0
        asked = (run, ratio, prompt, seed or 0, steps or None, None if own else guidance_scale, compensate)
        a, b, found = service.compare(*asked)
        return a.image, b.image, found

    given = [run, ratio, prompt, seed, steps, guidance, compensated]
    _endpoint(compare, given, [dense, pruned, gr.JSON(visible=False)], service.compare)


def _with_files() -> None:
    """Endpoints that take or give files."""
    run, ratio, compensated = (
        gr.Textbox(visible=False),
        gr.Number(visible=False),
        gr.Checkbox(True, visible=False),
    )
    model, file, facts = gr.Textbox(visible=False), gr.File(visible=False), gr.JSON(visible=False)
    one = gr.File(visible=False, file_types=[".safetensors"])
    repo, token = gr.Textbox("", visible=False), gr.Textbox("", visible=False)
    prompt, seed = gr.Textbox(visible=False), gr.Number(0, precision=0, visible=False)
    images = [gr.Image(visible=False, format="png") for _ in range(2)]
    several = gr.File(visible=False, file_count="multiple", file_types=[".safetensors", ".zip", ".pt"])

    @told
    @typed
    def download(run: str, ratio: float, compensate: bool = True):
        made = service.export(run, ratio, compensate)
        return made["path"], {key: made[key] for key in ("name", "folder", "bytes", "sha256")}

    @told
    @typed
    def lora(run: str, ratio: float, file: str):
        made = service.lora(run, ratio, file)
        return made["path"], {key: made[key] for key in ("name", "report", "dropped")}

    @told
    @typed
    def bring(model: str, files: list[str] | None = None, repo: str | None = "", token: str | None = ""):
        return service.bring(model, files or [], repo or "", token or "")

    @told
    @typed
    def lora_images(run: str, ratio: float, file: str, prompt: str, seed: Seed | None = 0):
        return tuple(sample.image for sample in service.lora_images(run, ratio, file, prompt, seed or 0))

    _endpoint(download, [run, ratio, compensated], [file, facts], service.export)
    _endpoint(lora, [run, ratio, one], [file, facts], service.lora)
    _endpoint(lora_images, [run, ratio, one, prompt, seed], images, service.lora_images)
    _endpoint(told(typed(service.plan_file)), [run, ratio], file, service.plan_file)
    _endpoint(bring, [model, several, repo, token], facts, service.bring)


def _endpoint(function, inputs, outputs, source) -> None:
    """`function` under its own name, described by `source`."""
    gr.Button(visible=False).click(
        function, inputs, outputs, api_name=function.__name__, api_description=source.__doc__
    )
