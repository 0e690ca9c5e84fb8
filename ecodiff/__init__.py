"""ecodiff: make diffusion models smaller by learning which heads and neurons matter.

>>> import ecodiff
>>> pipe = ecodiff.load("emoji-sdxl")
>>> scores = ecodiff.learn_masks(pipe, ["a red apple", "a cat"], ecodiff.LearnConfig())
>>> small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
>>> ecodiff.compensate_(small, pipe, ["a red apple", "a cat"])
>>> ecodiff.save(small, "emoji-sdxl-eco20")

Names are imported when they are first used: `import ecodiff` alone imports neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from . import _moved  # noqa: F401 - module names of 0.1 go on working

if TYPE_CHECKING:
    from .architectures import find_groups
    from .checkpoints.loading import load
    from .checkpoints.lora import translate_lora
    from .checkpoints.lora_saving import save_lora
    from .checkpoints.saving import save
    from .config import CompensateConfig, HealConfig, LearnConfig
    from .errors import EcodiffError
    from .learning.compensate import compensate_
    from .learning.heal import heal
    from .learning.learn import learn_masks
    from .learning.state import LearnState
    from .learning.text_encoders import rank_text_encoders
    from .learning.trajectory import trajectory
    from .metrics.fidelity import compare
    from .pruning.masking import masked
    from .pruning.plan import PrunePlan
    from .pruning.scores import Scores
    from .pruning.slicing import slice_, slice_like_, variant
    from .units import PruneGroup

_HOMES = {
    "CompensateConfig": "config",
    "EcodiffError": "errors",
    "HealConfig": "config",
    "LearnConfig": "config",
    "LearnState": "learning.state",
    "PruneGroup": "units",
    "PrunePlan": "pruning.plan",
    "Scores": "pruning.scores",
    "compare": "metrics.fidelity",
    "compensate_": "learning.compensate",
    "find_groups": "architectures",
    "heal": "learning.heal",
    "learn_masks": "learning.learn",
    "load": "checkpoints.loading",
    "masked": "pruning.masking",
    "rank_text_encoders": "learning.text_encoders",
    "save": "checkpoints.saving",
    "save_lora": "checkpoints.lora_saving",
    "slice_": "pruning.slicing",
    "slice_like_": "pruning.slicing",
    "trajectory": "learning.trajectory",
    "translate_lora": "checkpoints.lora",
    "variant": "pruning.slicing",
}

__all__ = [
    "CompensateConfig",
    "EcodiffError",
    "HealConfig",
    "LearnConfig",
    "LearnState",
    "PruneGroup",
    "PrunePlan",
    "Scores",
    "compare",
    "compensate_",
    "find_groups",
    "heal",
    "learn_masks",
    "load",
    "masked",
    "rank_text_encoders",
    "save",
    "save_lora",
    "slice_",
    "slice_like_",
    "trajectory",
    "translate_lora",
    "variant",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
