"""The models that are offered by name, and how each is used by default."""

from dataclasses import dataclass, field
from pathlib import Path

from .compensate import CompensateConfig
from .state import LearnConfig

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
    """

    name: str
    source: str
    title: str
    steps: int
    guidance_scale: float
    size: int | None
    learn_steps: int
    dtype: str
    licence: str
    gated: bool = False
    extra: dict = field(default_factory=dict)  # more arguments of the pipeline's call

    @property
    def embedded(self) -> bool:
        return Path(self.source).is_absolute()

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

    def drawing(self, steps: int | None = None, guidance_scale: float | None = None) -> dict:
        """Options of `fidelity.generate`: as given, else this model's defaults."""
        return {
            "steps": steps or self.steps,
            "guidance_scale": self.guidance_scale if guidance_scale is None else guidance_scale,
            "size": self.size,
            "extra": self.extra,
        }

    def prompts(self, which: str) -> list[str]:
        """Prompts to learn on ("calibration") or to judge by ("heldout"): never the same ones."""
        folder = Path(self.source) if self.embedded else EMBEDDED
        text = (folder / "prompts" / f"{which}.txt").read_text(encoding="utf-8")
        return [line for line in text.splitlines() if line.strip()]


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            "emoji-sdxl",
            str(EMBEDDED / "emoji-sdxl"),
            "emoji-sdxl · 8 M, ships with ecodiff",
            steps=20,
            guidance_scale=3.0,
            size=64,
            learn_steps=12,
            dtype="float16",
            licence="mit",
        ),
        Model(
            "emoji-turbo",
            str(EMBEDDED / "emoji-turbo"),
            "emoji-turbo · 8 M, four steps, ships with ecodiff",
            steps=4,
            guidance_scale=0.0,
            size=64,
            learn_steps=4,
            dtype="float16",
            licence="mit",
        ),
        Model(
            "emoji-flux",
            str(EMBEDDED / "emoji-flux"),
            "emoji-flux · 8 M, ships with ecodiff",
            steps=20,
            guidance_scale=3.0,
            size=64,
            learn_steps=12,
            dtype="float16",
            licence="mit",
            extra={"max_sequence_length": 28},
        ),
        Model(
            "sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "Stable Diffusion XL · 2.6 B, from the Hub",
            steps=30,
            guidance_scale=5.0,
            size=1024,
            learn_steps=12,
            dtype="float16",
            licence="openrail++",
        ),
        Model(
            "sdxl-turbo",
            "stabilityai/sdxl-turbo",
            "SDXL Turbo · 2.6 B, one step, from the Hub",
            steps=1,
            guidance_scale=0.0,
            size=512,
            learn_steps=1,
            dtype="float16",
            licence="sai-nc-community",
        ),
        Model(
            "flux-dev",
            "black-forest-labs/FLUX.1-dev",
            "FLUX.1 dev · 11.9 B, from the Hub, gated",
            steps=28,
            guidance_scale=3.5,
            size=1024,
            learn_steps=12,
            dtype="bfloat16",
            licence="flux-1-dev-non-commercial-license",
            gated=True,
        ),
        Model(
            "flux-schnell",
            "black-forest-labs/FLUX.1-schnell",
            "FLUX.1 schnell · 11.9 B, four steps, from the Hub",
            steps=4,
            guidance_scale=0.0,
            size=1024,
            learn_steps=4,
            dtype="bfloat16",
            licence="apache-2.0",
            gated=True,
            extra={"max_sequence_length": 256},
        ),
        Model(
            "sd-3.5-large",
            "stabilityai/stable-diffusion-3.5-large",
            "Stable Diffusion 3.5 Large · 8.1 B, from the Hub, gated",
            steps=28,
            guidance_scale=3.5,
            size=1024,
            learn_steps=12,
            dtype="bfloat16",
            licence="stabilityai-ai-community",
            gated=True,
        ),
        Model(
            "sd-1.5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "Stable Diffusion 1.5 · 0.9 B, from the Hub",
            steps=30,
            guidance_scale=7.5,
            size=512,
            learn_steps=12,
            dtype="float16",
            licence="creativeml-openrail-m",
        ),
    )
}


def find(name: str) -> Model:
    """The catalogue's entry of `name`, or one with cautious defaults for any folder or Hub id."""
    if name in MODELS:
        return MODELS[name]
    by_source = {model.source: model for model in MODELS.values()}
    if name in by_source:
        return by_source[name]
    return Model(name, name, name, 30, 5.0, None, learn_steps=12, dtype="float16", licence="other")
