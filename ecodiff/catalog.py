"""The models that are offered by name, and how each is used by default: models.json, read."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from .config import CompensateConfig, HealConfig, LearnConfig
from .model_files import CAUTIOUS, few_steps, json_of, licence, one_frame, settings_of
from .pipelines import DENOISERS, SECOND_DENOISERS
from .storage import PLAN_FILE, read_header

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Model:
    """A model and its defaults.

    Attributes:
        name: what a person picks or types.
        component: the denoiser that is pruned, if the pipeline has two and it is not the first.
        source: a folder, a Hub repository id, or a file in one: owner/name/file.safetensors.
        steps, guidance_scale, size: of a generated image (pixels a side; None: the pipeline's).
        learn_steps: time steps of a trajectory while learning.
        dtype, files: in which it is opened; in which its files hold the denoiser, if that is another type.
        licence: of the weights; a pruned checkpoint inherits it.
        gated: the Hub wants its licence accepted first.
        extra: more arguments of the pipeline's call.
        others_gb: 10^9 bytes of text encoders and autoencoder in `dtype`, to one digit.
        denoiser: its published configuration, so that it can be counted without a network.
        base: of a pruned folder, the name of its dense model.
        prompts_folder: where its prompts are; "": those that are for all models.
        lora_of: `source` is a LoRA, to be fused into this model of the catalogue.
        scheduler: its class and settings, if they are not those of its files.
        parts: components that its repository leaves to others, and those.
    """

    name: str
    source: str
    title: str
    steps: int
    guidance_scale: float | None
    size: int | None
    learn_steps: int
    dtype: str
    licence: str
    gated: bool = False
    files: str = ""
    extra: dict = field(default_factory=dict)
    others_gb: float = 0.0
    denoiser: dict | None = None
    base: str = ""
    prompts_folder: str = ""
    lora_of: str = ""
    scheduler: dict = field(default_factory=dict)
    component: str = ""
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def embedded(self) -> bool:
        return Path(self.source).parent == EMBEDDED

    @property
    def denoisers(self) -> tuple[str, ...]:
        """What the component that is pruned may be called."""
        return (self.component,) if self.component else DENOISERS

    @property
    def repository(self) -> str:
        """That of a source on the Hub, also of a file in it."""
        return "/".join(self.source.split("/")[:2])

    def sampling(self) -> dict:
        """Of the trajectories that are learned on: this model's defaults."""
        return {
            "inference_steps": self.learn_steps,
            "guidance_scale": self.guidance_scale,
            "size": self.size,
            "extra": self.extra,
        }

    def learn_config(self, preset: str, ratio: float, **changes) -> LearnConfig:
        """A preset with this model's defaults. Raises BudgetError if there is no such preset."""
        return LearnConfig.preset(
            preset,
            ratio=ratio,
            **self.sampling() | changes,
        )

    def compensation(self) -> CompensateConfig:
        """How weights are compensated, with this model's defaults."""
        return CompensateConfig(**self.sampling())

    def heal_config(self, **changes) -> HealConfig:
        """How a pruned one is healed, with this model's defaults."""
        return HealConfig(**self.sampling() | changes)

    def drawing(
        self, steps: int | None = None, guidance_scale: float | None = None, size: int | None = None
    ) -> dict:
        """Options of `fidelity.generate`: as given, else this model's defaults."""
        return {
            "steps": self.steps if steps is None else steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
            "size": self.size if size is None else size,
            "extra": self.extra,
        }

    def footprint(self, itemsize: int | None = None) -> dict:
        """What `memory.estimate` needs. `itemsize`: bytes of a weight; None: as in its files."""
        on_disk = 4 if self.dtype == "float32" else 2
        return {
            "itemsize": itemsize or on_disk,
            "others": self.others_gb * 1e9 / on_disk,
            "size": self.size or 1024,
            "guided": (self.guidance_scale or 0) > 1,
        }

    def prompts(self, which: str) -> list[str]:
        """Prompts to learn on ("calibration") or to judge by ("heldout"): never the same ones."""
        folder = Path(self.prompts_folder or (self.source if self.embedded else EMBEDDED / "."))
        text = (folder / "prompts" / f"{which}.txt").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()]


def _read(entry: dict, denoisers: dict[str, dict]) -> Model:
    """An entry of models.json; one whose denoiser is another's names that one."""
    if isinstance(same := entry.get("denoiser"), str):
        entry = entry | {"denoiser": denoisers[same]}
    embedded = EMBEDDED / entry["source"]
    return Model(**entry | ({"source": str(embedded)} if "/" not in entry["source"] else {}))


def _table(file: str) -> list[dict]:
    return json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))


_ENTRIES = {entry["name"]: entry for entry in _table("models.json")}
_DENOISERS = {name: entry["denoiser"] for name, entry in _ENTRIES.items() if "denoiser" in entry}
MODELS: dict[str, Model] = {name: _read(entry, _DENOISERS) for name, entry in _ENTRIES.items()}

SUPPORTED = _table("supported.json")  # written by tests/support.py
MEASURED = _table("measured.json")  # of benchmarks/fidelity*.json, written by tests/support.py


def supported(denoiser: str) -> list[dict]:
    """What the conformance suite passes of a denoiser's class: [{"name", "kinds", "pipeline"}]."""
    return [row for row in SUPPORTED if row["denoiser"] == denoiser.removeprefix("Sliced")]


def find(name: "str | Path | Model") -> Model:
    """What a name stands for: a folder, a model of the catalogue, or any Hub id with cautious defaults.

    A name is resolved once, where it comes in; a Model is what it is.

    "#transformer_2" behind a name is the second denoiser of a pipeline that has two (Wan 2.2 A14B).

    A folder's settings are those of the model that it was pruned from or is a copy of, a single file's those
    of the model that it is a variant of; else they are read off its own files. A folder that is called like
    a model of the catalogue is the folder.
    """
    if isinstance(name, Model):
        return name
    whole, _, component = str(name).strip().rpartition("#")
    if component in (*DENOISERS, *SECOND_DENOISERS) and not (Path(str(name)) / "model_index.json").is_file():
        return _of_component(find(whole), component)
    name = _repository(str(name).strip())
    by_source = {model.source: model for model in MODELS.values() if not model.component}
    if name in by_source:
        return by_source[name]
    if (Path(name) / "model_index.json").is_file():
        return _folder(Path(name), name)
    if name in MODELS:
        return MODELS[name]
    for model in MODELS.values():
        if "/" not in name and _plain(model.name) == _plain(name):  # "SD 1.5"
            return model
    if folder := _cached(name):
        return replace(_folder(folder, name), source=name)
    few = few_steps(name)
    if base := by_source.get(_base_of_file(name)):
        return replace(base, name=name, source=name, title=name, licence="other", gated=False, **few)
    return Model(name, name, name, **CAUTIOUS | few, size=None, dtype="float16", licence="other")


def _of_component(model: Model, component: str) -> Model:
    """The same model, of whose denoisers `component` is pruned."""
    for known in MODELS.values():
        if (known.source, known.component) == (model.source, component):
            return known
    base = find(f"{find(model.base).source}#{component}").name if model.base else ""
    return replace(model, name=f"{model.source}#{component}", component=component, base=base)


_READERS: list[Callable[[str], str]] = []


def read_files_by(base_of: Callable[[str], str]) -> None:
    """Have single files told by a function: from a path to the Hub id of what the file is a variant of, ""
    if it is of none. The catalogue itself reads no weights."""
    _READERS.append(base_of)


def _base_of_file(name: str) -> str:
    found = (base_of(name) for base_of in _READERS if name.endswith(".safetensors"))
    return next((source for source in found if source), "")


def _cached(name: str) -> Path | None:
    """Where the Hub's cache has what was read of a repository."""
    if name.count("/") != 1:
        return None
    try:
        index = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return None
    return Path(index).parent if isinstance(index, str) else None


def search(words: str) -> list[Model]:
    """Models of the catalogue that words match, best first: by name, title or Hub id, punctuation aside."""
    asked, parts = _plain(words), [_plain(word) for word in words.split()]
    ranked = []
    for place, model in enumerate(MODELS.values()):
        known = [_plain(text) for text in (model.name, model.title, "" if model.embedded else model.source)]
        if asked and all(any(part in text for text in known) for part in parts):
            ranked.append((known[0] != asked, not known[0].startswith(asked), place, model))
    return [model for *_, model in sorted(ranked, key=lambda entry: entry[:3])]


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


_LINK = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#\s]+/[^/?#\s]+)"
    r"(?:/(?:blob|resolve)/[^/?#\s]+/([^?#\s]+\.safetensors))?"
)


def _repository(name: str) -> str:
    """The Hub id in a link to the Hub, with that of a file in it; any other name as it is."""
    found = _LINK.match(name)
    return "/".join(part for part in found.groups() if part) if found else name


def _folder(folder: Path, name: str) -> Model:
    """A folder as a model."""
    called: dict[str, Any] = {"name": name, "source": name, "title": name, "parts": {}}
    cut = read_header(folder / PLAN_FILE).get("metadata")
    base = json.loads(cut).get("model") if cut else None
    if base and base != name:
        known = find(base)
        prompts = known.prompts_folder or (known.source if known.embedded else "")
        called |= {"denoiser": None, "base": known.base or known.name, "prompts_folder": prompts}
        return replace(known, **called)
    for model in MODELS.values():
        if model.embedded and _same(Path(model.source), folder):
            return replace(model, **called, prompts_folder=model.source)
    prompts = str(folder) if (folder / "prompts" / "calibration.txt").is_file() else ""
    settings = settings_of(name, folder)
    settings |= {"size": None, "dtype": "float16", "licence": licence(folder), "prompts_folder": prompts}
    settings |= {"extra": one_frame(folder)}
    return Model(**called, **settings)


def _same(one: Path, other: Path) -> bool:
    """True if two folders hold the same pipeline with the same schedule, whatever their weights are."""

    def told(file: Path) -> dict:
        return {k: v for k, v in json_of(file).items() if not k.startswith("_") or k == "_class_name"}

    configs = ("scheduler/scheduler_config.json", "unet/config.json", "transformer/config.json")
    return all(told(one / file) == told(other / file) for file in ("model_index.json", *configs))
