"""How a model is used that the catalogue does not know: what its name and its own files say."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

# Of a model that nothing is known of.
CAUTIOUS: dict[str, Any] = {"steps": 30, "guidance_scale": 5.0, "learn_steps": 12}
# What distilled models are called, as far as they say so.
_STEPS = r"(?<!\d)([1-9])[-_ ]?steps?(?![a-z])"
_FEW = re.compile(rf"(?:turbo|lightning|hyper|schnell|lcm|dmd2?|sprint)(?![a-z])|{_STEPS}", re.IGNORECASE)


def few_steps(name: str) -> dict:
    """Steps and guidance of a model that is called like a distilled one; {} of any other."""
    last = name.rpartition("/")[2]
    if not _FEW.search(last):
        return {}
    told = re.search(_STEPS, last, re.IGNORECASE)
    steps = int(told[1]) if told else 4
    return {"steps": steps, "guidance_scale": 0.0, "learn_steps": steps}


def json_of(file: Path) -> dict:
    """What a file of JSON holds; {} if it is not there or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def distilled(folder: Path) -> dict:
    """Steps and guidance of a folder that was distilled to few steps, by its own files; {} of any other."""
    index, scheduler = (
        json_of(folder / "model_index.json"),
        json_of(folder / "scheduler" / "scheduler_config.json"),
    )
    transformer = json_of(folder / "transformer" / "config.json")
    few = {"steps": 4, "guidance_scale": 0.0, "learn_steps": 4}
    if index.get("is_distilled"):  # FLUX.2 klein
        return few | {"guidance_scale": 1.0}
    if str(scheduler.get("_class_name", "")).startswith(("LCM", "TCD", "FlowMatchLCM")):
        return few
    if scheduler.get("_class_name") == "EulerAncestralDiscreteScheduler" and (
        scheduler.get("timestep_spacing") == "trailing"
    ):  # SDXL and SD Turbo
        return few
    if transformer.get("_class_name") == "FluxTransformer2DModel" and not transformer.get("guidance_embeds"):
        return few  # FLUX.1 schnell
    return {}


def one_frame(folder: Path) -> dict:
    """With what a folder's pipeline draws one frame, if it draws clips: ecodiff learns from images."""
    cls = getattr(diffusers, str(json_of(folder / "model_index.json").get("_class_name")), None)
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        return {}
    takes = inspect.signature(cls.__call__).parameters
    return {name: 1 for name in ("num_frames", "video_length") if name in takes}


def _card(folder: Path) -> str:
    try:
        return (folder / "README.md").read_text(encoding="utf-8")[:100_000]
    except (OSError, ValueError):
        return ""


def licence(folder: Path) -> str:
    """The licence that a folder's model card names; "other" without one."""
    front = _card(folder).partition("---")[2].partition("---")[0]
    lines = (line.partition(":") for line in front.splitlines())
    return next((value.strip().strip('"') for key, _, value in lines if key.strip() == "license"), "other")


def told_by_card(folder: Path) -> dict:
    """Steps and guidance of the first example in a folder's model card that gives both; {} of any other."""
    number = r"\s*=\s*(\d{1,4}(?:\.\d{1,4})?)"
    for call in re.split(r"[()]", _card(folder)):
        steps, guidance = (
            re.search(name + number, call) for name in ("num_inference_steps", r"\bguidance_scale")
        )
        if steps and guidance and 1 <= (count := round(float(steps[1]))) <= 100 and float(guidance[1]) <= 30:
            few = {"learn_steps": count} if count <= CAUTIOUS["learn_steps"] else {}
            return {"steps": count, "guidance_scale": float(guidance[1])} | few
    return {}


def settings_of(name: str, folder: Path) -> dict:
    """How many steps and what guidance a folder is drawn with: its card's, if that goes with what its name
    and its schedule say of distillation; else theirs; else cautious ones."""
    few, told = few_steps(name) | distilled(folder), told_by_card(folder)
    if few and told.get("steps", 0) > CAUTIOUS["learn_steps"]:  # an example of another model, its teacher
        told = {}
    return CAUTIOUS | few | told
