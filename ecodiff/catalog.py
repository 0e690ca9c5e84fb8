"""The models that are offered by name, and how each is used by default: models.json, read."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from .config import CompensateConfig, HealConfig, LearnConfig

EMBEDDED = Path(__file__).parent / "embedded"


@dataclass(frozen=True)
class Model:
    """A model and its defaults.

    Attributes:
        name: what a person picks or types.
        source: a folder or a Hub repository id.
        steps, guidance_scale, size: of a generated image (pixels a side; None: the pipeline's).
        learn_steps: time steps of a trajectory while learning.
        dtype: in which its files hold the weights.
        licence: of the weights; a pruned checkpoint inherits it.
        gated: the Hub wants its licence accepted first.
        extra: more arguments of the pipeline's call.
        others_gb: 10^9 bytes of text encoders and autoencoder in `dtype`, to one digit.
        denoiser: its published configuration, so that it can be counted without a network.
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
    extra: dict = field(default_factory=dict)
    others_gb: float = 0.0
    denoiser: dict | None = None

    @property
    def embedded(self) -> bool:
        return Path(self.source).parent == EMBEDDED

    def learn_config(self, preset: str, ratio: float, **changes) -> LearnConfig:
        """A preset with this model's defaults. Raises BudgetError if there is no such preset."""
        return LearnConfig.preset(
            preset,
            ratio=ratio,
            inference_steps=self.learn_steps,
            guidance_scale=self.guidance_scale,
            size=self.size,
            extra=self.extra,
            **changes,
        )

    def compensation(self) -> CompensateConfig:
        """How weights are compensated, with this model's defaults."""
        return CompensateConfig(
            inference_steps=self.learn_steps,
            guidance_scale=self.guidance_scale,
            size=self.size,
            extra=self.extra,
        )

    def heal_config(self, **changes) -> HealConfig:
        """How a pruned one is healed, with this model's defaults."""
        config = HealConfig(
            inference_steps=self.learn_steps,
            guidance_scale=self.guidance_scale,
            size=self.size,
            extra=self.extra,
        )
        return replace(config, **changes)

    def drawing(self, steps: int | None = None, guidance_scale: float | None = None) -> dict:
        """Options of `fidelity.generate`: as given, else this model's defaults."""
        return {
            "steps": steps or self.steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
            "size": self.size,
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
        folder = Path(self.source) if self.embedded else EMBEDDED
        text = (folder / "prompts" / f"{which}.txt").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()]


def _read(entry: dict) -> Model:
    embedded = EMBEDDED / entry["source"]
    return Model(**entry | ({"source": str(embedded)} if "/" not in entry["source"] else {}))


def _table(file: str) -> list[dict]:
    return json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))


MODELS: dict[str, Model] = {entry["name"]: _read(entry) for entry in _table("models.json")}

SUPPORTED = _table("supported.json")  # written by tests/support.py
MEASURED = _table("measured.json")  # of benchmarks/fidelity*.json, written by tests/support.py


def supported(denoiser: str) -> list[dict]:
    """What the conformance suite passes of a denoiser's class: [{"name", "kinds", "pipeline"}]."""
    return [row for row in SUPPORTED if row["denoiser"] == denoiser.removeprefix("Sliced")]


def find(name: str) -> Model:
    """The catalogue's entry of `name`, or one with cautious defaults for any folder or Hub id."""
    if name in MODELS:
        return MODELS[name]
    by_source = {model.source: model for model in MODELS.values()}
    if name in by_source:
        return by_source[name]
    return Model(name, name, name, 30, 5.0, None, learn_steps=12, dtype="float16", licence="other")
