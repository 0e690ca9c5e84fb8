"""What pruning a model will leave and take, by arithmetic on its configuration."""

import os
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import Field
from torch import nn

from ... import catalog, machine
from ...architectures import find_groups, unrecognised
from ...checkpoints import hub, loading
from ...checkpoints.formats import FORMATS
from ...checkpoints.sign_in import signed_in
from ...checkpoints.text_encoders import empty_text_encoders
from ...config import LearnConfig
from ...errors import BudgetError, ModelNotFoundError
from ...learning.footprint import Footprint, fits, footprint
from ...learning.methods import METHODS, measured_best
from ...metrics.cost import parameters
from ...pruning.scores import Scores
from ...units import ALL_KINDS, PRESET_KINDS


@cache
def empty_denoiser(model: str) -> nn.Module:
    """A model's denoiser without weights, on the meta device."""
    return loading.empty_denoiser(model)


@cache
def unit_costs(model: str, kinds: tuple[str, ...] = PRESET_KINDS) -> tuple[Scores, int, int]:
    """Unit costs of a model, bytes of a weight in its files, bytes of all its weights (`counted`)."""
    scores = Scores.unranked(empty_denoiser(model), kinds)
    itemsize = loading.disk_dtype(model).itemsize
    known = catalog.find(model)
    files = Path(known.source).rglob("*.safetensors")
    weights = sum(file.stat().st_size for file in files if file.parent.name != "example")  # no weights
    return scores, itemsize, weights or scores.total * itemsize + round(known.others_gb * 1e9)


@cache
def encoder_parameters(model: str) -> int | None:
    """Parameters of a model's text encoders, as far as it is on this machine: the Hub is not asked for it."""
    if not Path(catalog.find(model).source).exists():
        return None
    encoders = empty_text_encoders(model).values()
    return sum(parameters(encoder) for encoder in encoders)


def counted(model: str) -> str:
    """What a model's bytes are of: "pipeline", or where nothing is known of the rest "denoiser"."""
    known = catalog.find(model)
    return "pipeline" if known.others_gb or Path(known.source).exists() else "denoiser"


def known_model(model: str) -> catalog.Model:
    """The model of that name. On a Space, visitors name models, not folders of the server."""
    known = catalog.find(model)
    if os.environ.get("SPACE_ID") and not known.embedded and Path(known.source).exists():
        raise ModelNotFoundError(f"There is no model {model!r}. Give an embedded model or a Hub id.")
    return known


def permitted_model(model: str, token: str) -> catalog.Model:
    """The model of that name. On a Space its files may be here already: who asks must have a right to them.

    Raises:
        CheckpointError: it is gated or private, and who asks is not signed in or has no access.
    """
    known = known_model(model)
    public = known.embedded or Path(known.source).exists()
    public = public or (known.name in catalog.MODELS and not known.gated)
    if os.environ.get("SPACE_ID") and not public:
        for repository in dict.fromkeys((known.repository, *known.parts.values())):
            hub.require_access(repository, token)
    return known


def find_models(words: str, hub_too: bool = True) -> dict:
    """Models that match words, of the catalogue and of the Hub, as far as ecodiff can prune them.

    Returns:
        {"catalogue": [{"name", "title", "id", "licence"}], "hub": [what `hub.search` returns],
        "error": why the Hub was not searched, or ""}; best matches and most downloads first
    """
    return hub.find_models(words, False, hub_too)


@cache
def needs(model: str, itemsize: int | None = None) -> Footprint:
    """What a model takes in memory; `itemsize`: bytes of a weight, None: as in its files."""
    known = catalog.find(model)
    return footprint(empty_denoiser(known.name), **known.footprint(itemsize))


def predict(
    model: str,
    ratio: float,
    preset: str = "fast",
    kinds: list[str] | None = None,
    gpu: int | None = None,
    token: str = "",
    text_encoders: Annotated[float, Field(ge=0, le=0.9)] = 0.0,
) -> dict:
    """What pruning will leave, by arithmetic on the model's configuration.

    Args:
        model: embedded name, folder or Hub id.
        ratio: fraction of the denoiser's parameters to remove.
        preset, kinds: as `start` takes them: what may go.
        gpu: 10^9 bytes of memory of the GPU that it should fit; None: of this machine's device.
        token: as `start` takes it.
        text_encoders: fraction of the text encoders' parameters to remove.

    Returns:
        {"params_dense", "params_pruned", "bytes_dense", "bytes_pruned", "bytes_of": "pipeline", or "denoiser"
        where nothing is known of the rest, "encoders": parameters of the text encoders, None where the model
        is not on this machine and they were not counted, "ceiling": share of the parameters that can go at
        most, "units": what holds those, in words, "licence", "gated", "reads": repositories of other parts,
        "supported": what the conformance suite passes of this architecture, "memory": {"draw": pruned,
        everything on the device, "learn", "streamed": with weights in main memory, "here"}, bytes: estimates,
        and what the device has, "fits": as `learning.footprint.fits` says, with "gpu", "left_alone":
        {class: parameters that no unit holds}}
    """
    shapes_are_known = catalog.find(model).name in catalog.MODELS  # to everybody, gated or not
    known = known_model(model) if shapes_are_known else permitted_model(model, token)
    wanted = LearnConfig.preset(preset, **{"kinds": tuple(kinds)} if kinds else {}).kinds
    with signed_in(token):
        scores, itemsize, dense_bytes = unit_costs(known.name, wanted)
        denoiser = empty_denoiser(known.name)
    removed = round(checked_ratio(ratio, scores) * scores.total)
    encoders = encoder_parameters(known.name)
    gone = removed + round(text_encoders * (encoders or 0))
    device = machine.together(machine.device())[0]
    here = machine.capacity(device)
    need = needs(known.name, 4 if device.type == "cpu" and not gpu else None)
    room = gpu * 1e9 if gpu else here
    return {
        "params_dense": scores.total,
        "params_pruned": scores.total - removed,
        "bytes_dense": dense_bytes,
        "bytes_pruned": dense_bytes - gone * itemsize,
        "bytes_of": counted(known.name),
        "encoders": encoders,
        "ceiling": scores.ceiling,
        "units": scores.kinds_in_words.replace(" or ", ", "),
        "licence": known.licence,
        "gated": known.gated,
        "reads": sorted(set(known.parts.values())),
        "supported": catalog.supported(type(denoiser).__name__),
        "memory": {"draw": need.pruned(ratio).draw, "here": here}
        | {"learn": need.learn, "streamed": need.learn_streamed},
        "fits": fits(need, ratio, scores.ceiling, room, bool(gpu) or device.type == "cuda") | {"gpu": gpu},
        "left_alone": unrecognised(denoiser, find_groups(denoiser, ALL_KINDS)),
    }


def require_memory(model: str) -> None:
    """Raise BudgetError if a model cannot be learned here, not even on one trajectory at a time."""
    device = machine.together(machine.device())[0]
    here, need = machine.capacity(device), needs(model, 4 if device.type == "cpu" else None)
    if (least := need.learn_least(device.type == "cuda")) > here:
        raise BudgetError(
            f"Learning on {model} takes at least {machine.megabytes(least)} (estimate), and there are "
            f"{machine.megabytes(here)} here. Learn it on a larger machine, and import the plan here."
        )


def methods() -> list[tuple[str, str]]:
    """Other ways to rank units than a preset's: (what it is, its name), as `start` takes for a preset."""
    return [(f"{method.name}: {method.source}", method.name) for method in METHODS.values()]


def formats() -> list[tuple[str, str]]:
    """Ways to export that are installed here: (what it is, its name), as `export` takes."""
    return [(f"{entry.name}: {entry.words}", entry.name) for entry in FORMATS.values() if entry.here]


def default_preset(model: str) -> str:
    """The preset that a model is best learned with, as far as that is measured."""
    return measured_best(empty_denoiser(known_model(model).name), "fast")


def kinds_of(preset: str) -> tuple[str, ...]:
    """The kinds of units that a preset prunes."""
    return LearnConfig.preset(preset).kinds


def checked_ratio(ratio: float, scores: Scores) -> float:
    """The ratio. Raises BudgetError unless that much can be removed."""
    if not 0 < ratio <= scores.ceiling:
        raise BudgetError(
            f"Between 0 and {scores.ceiling:.1%} of this model's parameters can be removed (the rest "
            f"is not in {scores.kinds_in_words}); {ratio:.1%} was asked for."
        )
    return ratio
