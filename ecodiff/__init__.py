"""ecodiff: make diffusion models smaller by learning which heads and neurons matter.

>>> import ecodiff
>>> pipe = ecodiff.load("emoji-sdxl")
>>> scores = ecodiff.learn_masks(pipe, ["a red apple", "a cat"], ecodiff.LearnConfig())
>>> small = ecodiff.variant(pipe, scores.plan(ratio=0.2))
>>> ecodiff.compensate_(small, pipe, ["a red apple", "a cat"])
>>> ecodiff.save(small, "emoji-sdxl-eco20")
"""

from .checkpoint import load, save
from .compensate import CompensateConfig, compensate_
from .errors import EcodiffError
from .fidelity import compare
from .gates import masked
from .groups import PruneGroup, find_groups
from .learn import learn_masks
from .lora import save_lora, translate_lora
from .plan import PrunePlan
from .scores import Scores
from .slicing import slice_, variant
from .state import LearnConfig, LearnState
from .trajectory import trajectory

__all__ = [
    "CompensateConfig",
    "EcodiffError",
    "LearnConfig",
    "LearnState",
    "PruneGroup",
    "PrunePlan",
    "Scores",
    "compare",
    "compensate_",
    "find_groups",
    "learn_masks",
    "load",
    "masked",
    "save",
    "save_lora",
    "slice_",
    "trajectory",
    "translate_lora",
    "variant",
]
