"""Named endpoints: everything on the page, for gradio_client and HTTP."""

import functools
import inspect
from collections.abc import Callable

import gradio as gr
from pydantic import ValidationError, validate_call

from .. import service
from .common import told


def build() -> None:
    """Register the endpoints. Call inside Blocks."""
    _plain()
    _with_images()
    _with_files()


def typed(function: Callable) -> Callable:
    """Refuse arguments that are not what `function` is annotated with: anybody may send any JSON."""
    names, checked = list(inspect.signature(function).parameters), validate_call(function)

    def call(*args, **kwargs):
        try:
            return checked(*args, **kwargs)
        except ValidationError as error:
            wrong = error.errors()[0]
            name = wrong["loc"][0]
            name = names[name] if isinstance(name, int) else name
            raise gr.Error(
                f"{name} is {wrong['input']!r:.80}. {wrong['msg']}.", print_exception=False
            ) from None

    def generator(*args, **kwargs):
        yield from call(*args, **kwargs)

    return functools.wraps(function)(generator if inspect.isgeneratorfunction(function) else call)


# Endpoints that take and give plain data, by name. Of a generator the last result is the answer; those before
# it tell Gradio whether the client is still there, and if it is not, the work ends.
PLAIN: dict[str, Callable] = {
    "find_models": service.find_models,
    "predict": service.predict,
    "default_preset": service.default_preset,
    "prune_start": service.start,
    "prune_status": service.status,
    "prune_step": service.learn,
    "prune_stop": service.stop,
    "prune_resume": service.resume,
    "cut": service.cut,
    "example": service.example,
    "pictures": service.pictures,
    "draw_pictures": service.draw_pictures,
    "sizes": service.survey,
    "rename": service.rename,
    "delete": service.delete,
    "heal": service.heal,
    "push": service.push,
}


def of_dicts(function: Callable) -> Callable:
    """A generator function of dicts as Gradio wants one to be annotated: with what it yields."""
    if inspect.isgeneratorfunction(function):
        function.__dict__["__signature__"] = inspect.signature(function).replace(return_annotation=dict)
        function.__annotations__ = function.__annotations__ | {"return": dict}
    return function


def _plain() -> None:
    for name, function in PLAIN.items():
        gr.api(of_dicts(told(typed(function))), api_name=name, api_description=function.__doc__)


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
        seed: service.Seed | None,
        steps: int | None,
        guidance_scale: float | None,
        compensate: bool = True,
    ):
        own = guidance_scale is None or guidance_scale < 0
        asked = (run, ratio, prompt, seed or 0, steps or None, None if own else guidance_scale, compensate)
        for a, b, found in service.compare(*asked):
            yield a.image, b and b.image, found

    given = [run, ratio, prompt, seed, steps, guidance, compensated]
    _endpoint(compare, given, [dense, pruned, gr.JSON(visible=False)], service.compare)


def _with_files() -> None:
    """Endpoints that take or give files."""
    run, ratio, compensated = (
        gr.Textbox(visible=False),
        gr.Number(visible=False),
        gr.Checkbox(True, visible=False),
    )
    chosen, naming = gr.Textbox("diffusers", visible=False), gr.Textbox("diffusers", visible=False)
    lean = gr.Checkbox(False, visible=False)
    model, file, facts = gr.Textbox(visible=False), gr.File(visible=False), gr.JSON(visible=False)
    one = gr.File(visible=False, file_types=[".safetensors"])
    repo, token = gr.Textbox("", visible=False), gr.Textbox("", visible=False)
    prompt, seed = gr.Textbox(visible=False), gr.Number(0, precision=0, visible=False)
    images = [gr.Image(visible=False, format="png") for _ in range(2)]
    several = gr.File(visible=False, file_count="multiple", file_types=[".safetensors", ".zip", ".pt"])

    @told
    @typed
    def download(
        run: str,
        ratio: float,
        compensate: bool = True,
        format: str | None = "diffusers",
        lean: bool = False,
    ):
        made = service.export(run, ratio, compensate, format or "diffusers", lean)
        return made["path"], {key: made[key] for key in ("name", "folder", "bytes", "sha256", "left_out")}

    @told
    @typed
    def lora(run: str, ratio: float, file: str, naming: str | None = "diffusers"):
        made = service.lora(run, ratio, file, naming or "diffusers")
        return made["path"], {key: made[key] for key in ("name", "report", "dropped")}

    @told
    @typed
    def bring(model: str, files: list[str] | None = None, repo: str | None = "", token: str | None = ""):
        return service.import_(model, files or [], repo or "", token or "")

    @told
    @typed
    def lora_images(run: str, ratio: float, file: str, prompt: str, seed: service.Seed | None = 0):
        return tuple(sample.image for sample in service.lora_images(run, ratio, file, prompt, seed or 0))

    _endpoint(download, [run, ratio, compensated, chosen, lean], [file, facts], service.export)
    _endpoint(lora, [run, ratio, one, naming], [file, facts], service.lora)
    _endpoint(lora_images, [run, ratio, one, prompt, seed], images, service.lora_images)
    _endpoint(told(typed(service.plan_file)), [run, ratio], file, service.plan_file)
    _endpoint(bring, [model, several, repo, token], facts, service.import_)


def _endpoint(function, inputs, outputs, source) -> None:
    """`function` under its own name, described by `source`."""
    gr.Button(visible=False).click(
        function, inputs, outputs, api_name=function.__name__, api_description=source.__doc__
    )
